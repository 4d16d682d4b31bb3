"""Loads a causal language model from a Hugging Face directory, and proves that it can be trained packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from services.common.config import Config
from services.common.config.lora import LoraConfig
from services.common.errors import ConfigError
from services.common.model_files import fp8_weights
from services.trainer.backends.torch import attention
from services.trainer.backends.torch.experts import choose_experts
from services.trainer.backends.torch.fp8_directory import load_dequantised
from services.trainer.backends.torch.logprobs import DeviceBatch, predicting_states, to_device, token_logprobs
from services.trainer.backends.torch.lora import add_adapters
from services.trainer.backends.torch.precision import HALF
from services.trainer.backends.torch.sharding import Placement, Root, place
from services.trainer.backends.torch.values import ValueModel
from services.trainer.batch.packing import PackItem, pack

FIELD, REFERENCE_FIELD = "model.hf_checkpoint", "model.ref_checkpoint"
# Largest difference between the packed and the plain forward pass that rounding explains: of a log-probability, in half
# precision as a share of the standard deviation of logits that vary by more than 1, or of a hidden state as a share.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
_PROBE_PROMPT = 3

Tokens = np.ndarray[Any, np.dtype[np.int32]]


def start_directory(config: Config) -> tuple[Path, str]:
    """Where training begins, and the key that names it: `model.hf_checkpoint`. That is the engines' where it holds fp8,
    and training begins with `model.ref_checkpoint`, if it is given.
    """
    directory, reference = config.model.hf_checkpoint, config.model.ref_checkpoint
    if reference is not None and fp8_weights(directory):
        return reference, REFERENCE_FIELD
    return directory, FIELD


def load_model(
    directory: Path,
    dtype: str,
    placement: Placement,
    field: str = FIELD,
    *,
    trained: bool = True,
    lora: LoraConfig | None = None,
) -> Root:
    """The model in evaluation mode (no dropout), with packed attention, computing in `dtype`. Weights that the
    directory holds in fp8 are dequantised. With a rank, `lora` freezes them and adds adapters.

    Raises ConfigError, naming `field`, when the directory does not hold a complete model that transformers knows, or
    when its architecture computes something else packed than it does unpacked.
    """
    model = from_directory(directory, dtype, field).eval().requires_grad_(trained)
    if lora is not None and lora.rank:
        add_adapters(model, lora)
    attention.register()
    choose_experts(model, placement.device, getattr(torch, dtype))
    root = place(model, getattr(torch, dtype), placement, field)
    _check_packing(root, placement.device, TOLERANCE[dtype], field)
    return root


def load_critic(directory: Path, dtype: str, placement: Placement, field: str) -> Root:
    """A `ValueModel` on the body of the model that `load_model` would give, and refused like it."""
    model = ValueModel(from_directory(directory, dtype, field).eval().base_model).requires_grad_(True)
    attention.register()
    choose_experts(model.base_model, placement.device, getattr(torch, dtype))
    root = place(model, getattr(torch, dtype), placement, field, [model.value_head])
    _check_packing(root, placement.device, TOLERANCE[dtype], field)
    return root


def context_length(config: transformers.PretrainedConfig) -> int | None:
    """Tokens of the longest sequence the model is made for, stretched as its rotary embeddings are; None: not said."""
    text = config.get_text_config()
    length: int | None = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if length is None or "factor" not in rope:
        return length
    # Where the original length is given, max_position_embeddings may, or may not, be the stretched one.
    return max(length, int(rope["factor"] * rope.get("original_max_position_embeddings", length)))


def outline(directory: Path, dtype: torch.dtype) -> Any:
    """The model of a Hugging Face directory without its weights: on the meta device, in `dtype`."""
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(directory, **options)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if (directory / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory, **options)
    return model


def save_pretrained(model: Any, weights: dict[str, torch.Tensor], dtype: torch.dtype, directory: Path) -> None:
    """Writes config, generation config and `weights` as transformers does, tied ones once.

    `model` gives all but the weights: its own may be sharded, or without content.
    """
    model.save_pretrained(directory, state_dict=weights)
    # It says what its parameters are, and those of a sharded model are float32.
    model.config.dtype = dtype
    model.config.save_pretrained(directory)


def from_directory(directory: Path, dtype: str, field: str) -> Any:
    """The model as transformers has it, on the host, in `dtype`. Raises ConfigError, naming `field`."""
    transformers.utils.logging.disable_progress_bar()
    options = {"attn_implementation": "sdpa", "output_loading_info": True}
    try:
        if fp8_weights(directory):
            model, info = load_dequantised(directory, getattr(torch, dtype), **options)
        else:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False, **options
            )
    except ConfigError as error:
        raise ConfigError(error.reason, field=field) from error
    except Exception as error:  # transformers raises many kinds, all of them about this directory
        reason = str(error).strip().splitlines() or [""]
        raise ConfigError(f"{directory} does not load: {type(error).__name__}: {reason[0]}", field=field) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(str(key) for key in (*info["missing_keys"], *info["mismatched_keys"]))
        raise ConfigError(
            f"{directory} lacks or has other shapes of {len(lacking)} weights, for example {lacking[0]}", field=field
        )
    return model


def _check_packing(root: Root, device: torch.device, tolerance: float, field: str) -> None:
    """Compares plain and packed log-probabilities, or a critic's hidden states, of three short sequences, two of which
    share a prompt.
    """
    model: Any = root.model
    critic = isinstance(model, ValueModel)
    name, what = (type(model.base_model), "states") if critic else (type(model), "log-probs")
    vocab = model.get_input_embeddings().weight.shape[0]
    rows = [[1, 2, 3, 4, 5], [1, 2, 3, 6, 7, 8, 9], [5, 4, 3, 2]]
    sequences = [np.array(row, dtype=np.int32) % vocab for row in rows]
    model.set_attn_implementation(attention.PLAIN)
    with torch.no_grad():
        found = [root.run(_plain_states if critic else _plain_logprobs, sequence, device) for sequence in sequences]
    plain, spread = (torch.cat(part) for part in zip(*found, strict=True))
    model.set_attn_implementation(attention.NAME)
    try:
        batch = to_device(pack([_probe(sequence, row) for row, sequence in enumerate(sequences)]), device)
        with torch.no_grad():
            packed = root.run(_packed_states if critic else _packed_logprobs, batch)
    except Exception as error:  # an architecture that does not take the layout fails in ways of its own
        raise ConfigError(
            f"{name.__name__} cannot be trained packed: {type(error).__name__}: {error}", field=field
        ) from error
    difference = (torch.linalg.vector_norm((plain - packed).reshape(len(plain), -1), dim=1) / spread).max().item()
    if not difference <= tolerance:
        raise ConfigError(f"{name.__name__} cannot be trained packed: {what} differ by {difference:.2g}", field=field)


class _Plain(NamedTuple):
    """Of each token that is compared: what is compared, and what its difference is a share of, [n]."""

    values: torch.Tensor
    spread: torch.Tensor


def _plain_logprobs(model: Any, sequence: Tokens, device: torch.device) -> _Plain:
    token_ids = torch.as_tensor(sequence, dtype=torch.int64, device=device)
    logits = model(input_ids=token_ids[None], use_cache=False).logits[0, _PROBE_PROMPT - 1 : -1]
    chosen = torch.log_softmax(logits.float(), dim=-1).gather(1, token_ids[_PROBE_PROMPT:, None]).squeeze(1)
    # 8 bits round a logit by a share of its size.
    rounded = logits.dtype in HALF
    return _Plain(chosen, logits.float().std(dim=1).clamp_min(1.0) if rounded else torch.ones_like(chosen))


def _packed_logprobs(model: Any, batch: DeviceBatch) -> torch.Tensor:
    return token_logprobs(model, batch).logprobs


def _plain_states(model: Any, sequence: Tokens, device: torch.device) -> _Plain:
    """Hidden states of norm 1: how far they are apart is a share of them, where rounding makes no more of it than of
    log-probs.
    """
    token_ids = torch.as_tensor(sequence, dtype=torch.int64, device=device)
    states = model.base_model(input_ids=token_ids[None], use_cache=False).last_hidden_state[0]
    values = torch.nn.functional.normalize(states[_PROBE_PROMPT - 1 : -1].float(), dim=1)
    return _Plain(values, torch.ones_like(values[:, 0]))


def _packed_states(model: Any, batch: DeviceBatch) -> torch.Tensor:
    return torch.nn.functional.normalize(predicting_states(model, batch).float(), dim=1)


def _probe(sequence: Tokens, row: int) -> PackItem:
    targets = sequence[_PROBE_PROMPT:]
    return PackItem(
        token_ids=sequence[:-1],
        prompt_length=_PROBE_PROMPT,
        predict=np.arange(_PROBE_PROMPT - 1, len(sequence) - 1),
        targets=targets,
        rollout_logprobs=np.zeros(len(targets), dtype=np.float32),
        fresh=np.zeros(len(targets), dtype=np.bool_),
        weight=0.0,
        temperature=1.0,
        sample_row=row,
    )
