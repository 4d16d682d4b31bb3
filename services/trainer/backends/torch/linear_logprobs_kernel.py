"""What stands between the logits of a chunk and its log-probs, and the gradient of them, each in one pass on a GPU.

In torch's own operations the same takes a dozen passes over numbers that no cache holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK, _WARPS = 4096, 8


# Of both kernels: Triton has no types, and compiles a function by its source; its arguments are no Python values.
@triton.jit  # type: ignore[untyped-decorator]
def _row_figures(logits, targets, temperatures, logprobs, entropy, normalizer, vocabulary, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    temperature = tl.load(temperatures + row)
    columns = tl.arange(0, block)
    # Sums over columns c, c + block, ... for each c: of exp(x - largest), and of (x - largest) exp(x - largest).
    largest = tl.full((block,), float("-inf"), tl.float32)
    total = tl.zeros((block,), tl.float32)
    weighed = tl.zeros((block,), tl.float32)
    for start in range(0, vocabulary, block):
        x = tl.load(logits + start + columns, mask=start + columns < vocabulary, other=float("-inf")) / temperature
        larger = tl.maximum(largest, x)
        # Where nothing but -inf has been seen there is nothing to be added, and no difference to be taken.
        fell = tl.where(largest == float("-inf"), 0.0, largest - larger)
        down = tl.exp(fell)
        below = tl.where(x == float("-inf"), 0.0, x - larger)
        power = tl.where(x == float("-inf"), 0.0, tl.exp(below))
        weighed = down * (weighed + fell * total) + below * power
        total = down * total + power
        largest = larger
    top = tl.max(largest, axis=0)
    fell = tl.where(largest == float("-inf"), 0.0, largest - top)
    down = tl.exp(fell)
    sum_total = tl.sum(down * total, axis=0)
    mean = tl.sum(down * (weighed + fell * total), axis=0) / sum_total
    log_total = tl.log(sum_total)
    chosen = tl.load(logits + tl.load(targets + row)) / temperature
    tl.store(logprobs + row, chosen - top - log_total)
    tl.store(entropy + row, log_total - mean)
    tl.store(normalizer + row, top + log_total)


@triton.jit  # type: ignore[untyped-decorator]
def _logit_gradient(  # type: ignore[no-untyped-def]
    logits, targets, temperatures, normalizer, entropy, of_logprobs, of_entropy, gradient, vocabulary,
    with_entropy: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < vocabulary
    temperature = tl.load(temperatures + row)
    x = tl.load(logits + row * vocabulary + columns, mask=inside, other=0.0) / temperature
    logprob = x - tl.load(normalizer + row)
    wanted = tl.load(of_logprobs + row)
    factor = -wanted
    if with_entropy:
        factor = -(logprob + tl.load(entropy + row)) * tl.load(of_entropy + row) - wanted
    value = tl.exp(logprob) * factor
    value = tl.where(columns == tl.load(targets + row), value + wanted, value) / temperature
    tl.store(gradient + row * vocabulary + columns, value.to(gradient.dtype.element_ty), mask=inside)


def row_figures(
    logits: torch.Tensor, targets: torch.Tensor, temperatures: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, entropies and normalizers, float32 [n], of `logits` float32 [n, vocabulary], rows one after the other,
    before they are divided by `temperatures`.
    """
    logprobs, entropy, normalizer = (torch.empty_like(temperatures, dtype=torch.float32) for _ in range(3))
    with torch.cuda.device(logits.device):
        _row_figures[(len(logits),)](
            *(logits, targets, temperatures, logprobs, entropy, normalizer, logits.shape[1]),
            block=_BLOCK,
            num_warps=_WARPS,
        )
    return logprobs, entropy, normalizer


def logit_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperatures: torch.Tensor,
    normalizer: torch.Tensor,
    entropy: torch.Tensor,
    of_logprobs: torch.Tensor,
    of_entropy: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The gradient of the undivided logits [n, vocabulary], in `dtype`, from those of log-probs and entropies."""
    gradient = torch.empty_like(logits, dtype=dtype)
    grid = (len(logits), triton.cdiv(logits.shape[1], _BLOCK))
    with torch.cuda.device(logits.device):
        _logit_gradient[grid](
            *(logits, targets, temperatures, normalizer, entropy, of_logprobs),
            *(of_logprobs if of_entropy is None else of_entropy, gradient, logits.shape[1]),
            with_entropy=of_entropy is not None,
            block=_BLOCK,
            num_warps=_WARPS,
        )
    return gradient
