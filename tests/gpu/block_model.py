"""A real model whose every projection is whole fp8 blocks: SmolLM2-135M, which has 4.5 blocks a row, padded with zeros.

The padded model is the same function: added channels of the residual stream stay 0, added heads give 0. Training keeps
them so, since nothing reads them and they read nothing. RMSNorm's mean is over more channels, which its weight and its
epsilon make up for. It is a Qwen2, which is a Llama with biases, because SGLang does not find the scales of a Llama's
blocks.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import pad
from transformers import AutoTokenizer, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from services.common.model_files import BLOCK
from tests.gpu.models import QUANTIZATION, quantised


def padded(model: LlamaForCausalLM) -> Qwen2ForCausalLM:
    """With hidden size, heads × head size and keys × head size a multiple of `BLOCK`, in float32."""
    config = model.config
    width, size, per_key = config.hidden_size, config.head_dim, config.num_attention_heads // config.num_key_value_heads
    keys = config.num_key_value_heads
    while keys * size % BLOCK or keys * per_key * size % BLOCK:
        keys += 1
    # transformers refuses a hidden size that its heads do not divide.
    unit = math.lcm(BLOCK, keys * per_key)
    wide = math.ceil(width / unit) * unit
    changed = Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=wide,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=keys * per_key,
        num_key_value_heads=keys,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=config.rope_parameters,
        rms_norm_eps=config.rms_norm_eps * width / wide,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    if changed.hidden_size != changed.num_attention_heads * size:
        raise ValueError(f"{wide} channels are not {changed.num_attention_heads} heads of {size}")
    result = Qwen2ForCausalLM(changed).float()
    weights = model.float().state_dict()
    for name, place in result.state_dict().items():
        if name.endswith(".bias"):
            place.zero_()
            continue
        weight = weights[name]
        # From the last dimension to the first, as torch wants it.
        missing = [more for dim in reversed(range(place.ndim)) for more in (0, place.shape[dim] - weight.shape[dim])]
        place.copy_(pad(weight, missing))
        if name.endswith("norm.weight"):
            place.mul_(math.sqrt(width / wide))
    return result


def write_fp8(source: Path, target: Path) -> Path:
    """`source`, a directory of a Llama model, padded and in block-wise fp8 but for embeddings and norms, which are
    bfloat16. Returns `target`.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    model = padded(LlamaForCausalLM.from_pretrained(source, dtype=torch.float32))
    weights = {name: weight.detach().bfloat16() for name, weight in model.named_parameters()}
    save_file({name: weight.contiguous() for name, weight in quantised(weights).items()}, target / "model.safetensors")
    settings = model.config.to_dict() | {"dtype": "bfloat16", "quantization_config": QUANTIZATION}
    (target / "config.json").write_text(json.dumps(settings | {"architectures": ["Qwen2ForCausalLM"]}))
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    if (source / "generation_config.json").exists():
        shutil.copy(source / "generation_config.json", target)
    return target
