"""How the losses of tokens become the loss of a batch.

The reduction is a weight per token, computed over the whole optimizer step before anything is packed. The loss is the
plain sum of ``weight * token loss``, so it does not depend on packing or micro-batching (I10).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Reduction = Literal["per_sample", "per_token", "constant"]


def sample_weights(
    trained_tokens: ArrayLike, reduction: Reduction, constant: float | None = None
) -> NDArray[np.float64]:
    """The weight of each trained token of a sample, float64[samples].

    `trained_tokens` holds, for each sample of the optimizer step, the number of its tokens whose mask is 1.

    * ``per_sample``: the mean over samples of the mean over their trained tokens. A sample with no trained token adds
      nothing to the sum and still counts as a sample (slime: sum / max(mask sum, 1) / samples).
    * ``per_token``: the mean over all trained tokens of the step (DAPO, arXiv:2503.14476, equation 8).
    * ``constant``: the sum over trained tokens, divided by samples and by `constant`, which it needs: a long completion
      weighs no less per token than a short one (Dr. GRPO, arXiv:2503.20783).
    """
    counts = np.asarray(trained_tokens, dtype=np.float64)
    if reduction == "per_token":
        return np.full(counts.shape, 1.0 / max(counts.sum(), 1.0))
    if reduction == "constant":
        assert constant is not None
        return np.full(counts.shape, 1.0 / (constant * max(len(counts), 1)))
    return 1.0 / (np.maximum(counts, 1.0) * max(len(counts), 1))
