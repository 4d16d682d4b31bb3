"""Random models of real shapes, with a tokenizer that has a character for every id."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

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
