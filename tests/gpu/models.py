"""Random models of real shapes, with a tokenizer that has a character for every id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from services.common.model_files import BLOCK
from services.trainer.weights.form import EngineForm
from services.trainer.weights.snapshot import Snapshot, build_manifest

# Code points of letters and private use: assigned or not, all survive a round trip.
_FIRST, _SURROGATES = 0x21, range(0xD800, 0xE000)

QWEN3_0_6B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}


QWEN3_8B = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": False,
}
_SHARD_BYTES = 4 << 30
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
    "modules_to_not_convert": ["lm_head"],
}


def random_weights(shape: Mapping[str, Any], seed: int, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """Of a Qwen3 of this shape, by its Hugging Face names; each seed draws its own.

    The embeddings are drawn wide, so that distributions are far from uniform and a wrong version shows.
    """
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**shape))
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        weight = torch.empty(parameter.shape, dtype=dtype, device=device)
        if parameter.dim() == 1:
            weight.uniform_(0.5, 1.5, generator=generator)
        else:
            weight.normal_(std=0.1 if "embed" in name or "lm_head" in name else 0.02, generator=generator)
        weights[name] = weight
    return weights


def write_model(
    directory: Path, shape: Mapping[str, Any], seed: int, dtype: torch.dtype, device: str, *, fp8: bool = False
) -> Path:
    """Exports `random_weights` as a Hugging Face directory, its projections in block-wise fp8 if that is wanted; it
    never ends a completion by itself. Returns it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = Qwen3Config(**shape, eos_token_id=None, bos_token_id=None, dtype=dtype, architectures=["Qwen3ForCausalLM"])
    config.save_pretrained(directory)
    weights = random_weights(shape, seed, dtype, device)
    if fp8:
        weights = quantised(weights)
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": QUANTIZATION}))
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, weight in weights.items():
        if size > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.numel() * weight.element_size()
    with ThreadPoolExecutor(len(shards)) as pool:
        list(pool.map(partial(_write_shard, directory, len(shards)), range(len(shards)), shards))
    if len(shards) > 1:
        places = {name: _shard_name(number, len(shards)) for number, shard in enumerate(shards) for name in shard}
        index = {"metadata": {}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    _tokenizer(shape["vocab_size"]).save_pretrained(directory)
    return directory


def write_mixture(directory: Path, shape: Mapping[str, Any], seed: int, dtype: torch.dtype, device: str) -> Path:
    """A random Qwen3-MoE of this shape, as transformers draws and saves it. Returns `directory`."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, eos_token_id=None, bos_token_id=None)).to(dtype)
    model.save_pretrained(directory)
    _tokenizer(shape["vocab_size"]).save_pretrained(directory)
    return directory


def projections(weights: Mapping[str, torch.Tensor]) -> frozenset[str]:
    """Those that an fp8 model has in fp8."""
    return frozenset(name for name in weights if name.endswith("_proj.weight"))


def quantised(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Its projections in block-wise fp8, with their scales; the rest as it is."""
    form = EngineForm(fp8=projections(weights))
    snapshot = Snapshot(build_manifest(weights, 1 << 40, form), next(iter(weights.values())).device, form)
    snapshot.fill(weights.items())
    return snapshot.views


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"


def _write_shard(directory: Path, count: int, number: int, shard: Mapping[str, torch.Tensor]) -> None:
    file = directory / _shard_name(number, count)
    save_file({key: weight.cpu() for key, weight in shard.items()}, file, metadata={"format": "pt"})


def build_qwen3(directory: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, scale: float = 0.02) -> Path:
    """Writes a random model of Qwen3-0.6B's shape; it never ends a completion by itself.

    `scale`: standard deviation of the embeddings; the larger, the further its distributions are from uniform.
    """
    torch.manual_seed(seed)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(Qwen3Config(**QWEN3_0_6B, eos_token_id=None, bos_token_id=None)).to(dtype)
        with torch.no_grad():
            model.get_input_embeddings().weight.normal_(std=scale)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    _tokenizer(QWEN3_0_6B["vocab_size"]).save_pretrained(directory)
    return directory


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    vocab: dict[str, int] = {}
    point = _FIRST
    while len(vocab) < size:
        if point not in _SURROGATES:
            vocab[chr(point)] = len(vocab)
        point += 1
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
