"""Tiny random Hugging Face model directories: config, safetensors, and a real character-level tokenizer.

The vocabulary has 128 ids: `<pad>`, `<bos>`, `<eos>`, then printable ASCII and some Greek, one token a character.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE = 128
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_ASCII = "".join(c for c in string.printable if c not in "\r\x0b\x0c")
# So that every id a random model draws is text.
_GREEK = "".join(map(chr, range(0x3B1, 0x3B1 + VOCAB_SIZE - 3 - len(_ASCII))))
_CHARACTERS = _ASCII + _GREEK


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE without merges: as many tokens as characters, decode is the exact inverse."""
    vocab = {"<pad>": PAD_ID, "<bos>": BOS_ID, "<eos>": EOS_ID}
    for character in _CHARACTERS:
        vocab[character] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_tiny_qwen3(directory: Path, seed: int = 0, hidden: int = 64, layers: int = 2, **overrides: Any) -> Path:
    """Writes a random Qwen3 (tied embeddings, qk-norm, grouped queries, head_dim 32) and returns `directory`.

    `overrides` are fields of Qwen3Config.
    """
    fields = {**_common(hidden, layers), "head_dim": 32, "tie_word_embeddings": True, **overrides}
    return _save(Qwen3ForCausalLM, Qwen3Config(**fields), directory, seed)


def build_tiny_reward_model(directory: Path, seed: int = 0, hidden: int = 64, layers: int = 2) -> Path:
    """Writes a random Qwen3 with a classification head of one label and returns `directory`."""
    fields = {**_common(hidden, layers), "head_dim": 32, "tie_word_embeddings": True, "num_labels": 1}
    return _save(Qwen3ForSequenceClassification, Qwen3Config(**fields), directory, seed)


def build_tiny_qwen2(directory: Path, seed: int = 0, hidden: int = 64, layers: int = 2, **overrides: Any) -> Path:
    """Writes a random Qwen2 (bias on q, k and v; the biases are random too) and returns `directory`.

    Load its tokenizer with PreTrainedTokenizerFast: AutoTokenizer replaces the pre-tokenizer of Qwen2 models.
    """
    fields = {**_common(hidden, layers), "tie_word_embeddings": True, **overrides}
    return _save(Qwen2ForCausalLM, Qwen2Config(**fields), directory, seed)


def build_tiny_llama(directory: Path, seed: int = 0, hidden: int = 64, layers: int = 2, **overrides: Any) -> Path:
    """Writes a random Llama (untied embeddings) and returns `directory`."""
    fields = {**_common(hidden, layers), "tie_word_embeddings": False, **overrides}
    return _save(LlamaForCausalLM, LlamaConfig(**fields), directory, seed)


def build_tiny_qwen3_moe(directory: Path, seed: int = 0, hidden: int = 64, layers: int = 2, **overrides: Any) -> Path:
    """Writes a random Qwen3-MoE (untied embeddings, 7 experts of which a token has 2, with weights that add up to 1)
    and returns `directory`.
    """
    moe = {"moe_intermediate_size": 24, "num_experts": 7, "num_experts_per_tok": 2, "norm_topk_prob": True}
    fields = {**_common(hidden, layers), "head_dim": 32, "tie_word_embeddings": False, **moe, **overrides}
    return _save(Qwen3MoeForCausalLM, Qwen3MoeConfig(**fields), directory, seed)


def build_tiny_qwen2_moe(directory: Path, seed: int = 0, hidden: int = 64, layers: int = 2, **overrides: Any) -> Path:
    """Writes a random Qwen2-MoE (untied embeddings, 6 experts of which a token has 2, one that all tokens share) and
    returns `directory`. Its tokenizer: see `build_tiny_qwen2`.
    """
    moe = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 56, "num_experts": 6}
    moe |= {"num_experts_per_tok": 2}
    fields = {**_common(hidden, layers), "tie_word_embeddings": False, **moe, **overrides}
    return _save(Qwen2MoeForCausalLM, Qwen2MoeConfig(**fields), directory, seed)


def build_tiny_mixtral(directory: Path, seed: int = 0, hidden: int = 64, layers: int = 2, **overrides: Any) -> Path:
    """Writes a random Mixtral (untied embeddings, 5 experts of which a token has 2) and returns `directory`."""
    moe = {"intermediate_size": 40, "num_local_experts": 5, "num_experts_per_tok": 2}
    fields = {**_common(hidden, layers), "tie_word_embeddings": False, **moe, **overrides}
    return _save(MixtralForCausalLM, MixtralConfig(**fields), directory, seed)


def build_tiny_olmoe(directory: Path, seed: int = 0, hidden: int = 64, layers: int = 2, **overrides: Any) -> Path:
    """Writes a random OLMoE (norms over all query and key heads, 6 experts of which a token has 3, with weights that do
    not add up to 1) and returns `directory`.
    """
    moe = {"intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False}
    fields = {**_common(hidden, layers), "tie_word_embeddings": False, **moe, **overrides}
    return _save(OlmoeForCausalLM, OlmoeConfig(**fields), directory, seed)


def _common(hidden: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(2, hidden // 32),
        "num_key_value_heads": max(1, hidden // 64),
        "max_position_embeddings": 512,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }


def _save(cls: type[PreTrainedModel], config: Any, directory: Path, seed: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).to(torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Larger than the usual initialisation: the distributions are far from uniform, so that errors show.
                if name.endswith("bias"):
                    parameter.normal_(std=0.2)
                elif parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(std=0.3 if "embed" in name or "lm_head" in name else 0.12)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory
