"""A tiny Qwen3 learns one-digit addition: the whole system in two minutes on two CPU cores.

The model starts from a short supervised warm-up that gives it the format and one right answer in six, and improves by
asynchronous GRPO from there. It is the same path as a real run: a Hugging Face directory, a JSONL file,
deploy/config/demo.toml.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.cli.demo.common import config_file, prepare_directory
from services.cli.run import run as run_config
from services.common.config import load

# Every printable ASCII character is a token; id 0 ends a completion.
EOS = "<eos>"
WARMUP_BATCH = 256
# The warm-up ends when a sampled answer is right this often: enough for a first reward signal, far from solved.
WARMUP_ACCURACY = 0.16


def run(seed: int, overrides: Mapping[str, Any]) -> int:
    """Prepares what is missing under the run directory and runs."""
    config = load(config_file("demo.toml"), {"run.seed": seed, **overrides})
    prepare_directory(config.run.dir, "addition", config.run.seed)
    prepare(config.run.dir / "model", config.run.dir / "prompts.jsonl", config.run.seed)
    inputs = {
        "model.hf_checkpoint": str(config.run.dir / "model"),
        "data.prompt_data": str(config.run.dir / "prompts.jsonl"),
    }
    return run_config(load(config_file("demo.toml"), {"run.seed": seed, **inputs, **overrides}))


def prepare(model_dir: Path, prompts: Path, seed: int) -> None:
    """Writes the warmed-up model, its tokenizer and the prompt file, unless they are there."""
    prompts.parent.mkdir(parents=True, exist_ok=True)
    if not prompts.exists():
        rows = [{"prompt": f"{a}+{b}=", "label": str(a + b)} for a, b in _pairs()]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not model_dir.exists():
        partial = model_dir.with_name("model.partial")
        shutil.rmtree(partial, ignore_errors=True)
        _write_tokenizer(partial)
        _warmed_up_model(seed).save_pretrained(partial)
        partial.rename(model_dir)


def _pairs() -> list[tuple[int, int]]:
    return [(a, b) for a in range(1, 10) for b in range(1, 10)]


def _write_tokenizer(directory: Path) -> None:
    """One token per character: a real tokenizer directory that transformers and SGLang load."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {EOS: 0, **{chr(code): code for code in range(1, 128)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(directory)


def _warmed_up_model(seed: int) -> Any:
    """A two-layer, 410k-parameter Qwen3 after about 45 supervised steps on the task's format."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    torch.set_num_threads(os.cpu_count() or 1)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=128,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            tie_word_embeddings=True,
            max_position_embeddings=64,
            eos_token_id=0,
            pad_token_id=0,
            bos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    generator = random.Random(seed)
    step = 0
    while step < 20 or _accuracy(model) < WARMUP_ACCURACY:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 50)
        input_ids, labels = _rows([generator.choice(_pairs()) for _ in range(WARMUP_BATCH)])
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def _accuracy(model: Any) -> float:
    """The mean probability, over all prompts, that a sampled answer is exactly right."""
    import torch

    input_ids, labels = _rows(_pairs())
    with torch.no_grad():
        logprobs = model(input_ids=input_ids).logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    chosen = logprobs.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return float((chosen * (targets >= 0)).sum(1).exp().mean())


def _rows(pairs: Sequence[tuple[int, int]]) -> tuple[Any, Any]:
    """Input ids and labels [pairs, 7] of "a+b=c<eos>", padded; labels are -100 on the prompt and the padding."""
    import torch

    input_ids, labels = [], []
    for a, b in pairs:
        prompt, answer = [ord(c) for c in f"{a}+{b}="], [*map(ord, str(a + b)), 0]
        padding = 7 - len(prompt) - len(answer)
        input_ids.append(prompt + answer + [0] * padding)
        labels.append([-100] * len(prompt) + answer + [-100] * padding)
    return torch.tensor(input_ids), torch.tensor(labels)
