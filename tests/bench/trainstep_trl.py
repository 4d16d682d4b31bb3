"""TRL's side of `polyhead bench trainstep`, in TRL's environment: `python trainstep_trl.py SPEC.json`.

The real `GRPOTrainer.train()`: its loss, its log-probs, its accumulation, clip and optimizer. Only generation and
scoring are replaced, by the prepared batch, padded as TRL pads it: prompts on the left and completions on the right, to
the longest of the whole batch. With `trim` each micro-batch is cut to its own longest, which TRL does not do.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

Tensors = dict[str, torch.Tensor]


class Clock(TrainerCallback):
    """A step for each line on the standard input, answered by a line of figures."""

    def __init__(self, device: str, answers: Any) -> None:
        self.device, self.answers = device, answers
        self.losses: list[torch.Tensor] = []
        self.began = self.worked = 0.0

    def start(self) -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        self.losses.clear()
        self._synchronize()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.began, self.worked = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._synchronize()
        seconds, cpu_seconds = time.perf_counter() - self.began, time.process_time() - self.worked
        figures = {"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": sum(loss.item() for loss in self.losses)}
        print(json.dumps({**figures, "peak_bytes": self.peak_bytes()}), file=self.answers, flush=True)

    def peak_bytes(self) -> int:
        """On a CPU that of the process, model and libraries included."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


class Trainer(trl.GRPOTrainer):
    """With the prepared batch in place of generation and scoring."""

    def prepare(self, batch: Tensors, clock: Clock, *, trim: bool) -> None:
        self.batch, self.clock, self.trim = batch, clock, trim
        self.add_callback(clock)

    def _generate_and_score_completions(self, inputs: Any) -> Tensors:
        self.clock.start()
        return dict(self.batch)

    def _compute_loss(self, model: Any, inputs: Tensors) -> torch.Tensor:
        loss = super()._compute_loss(model, cut(inputs) if self.trim else inputs)
        self.clock.losses.append(loss.detach())
        return loss


def cut(inputs: Tensors) -> Tensors:
    """Without the columns in which a micro-batch has only padding."""
    prompt, completion = (int(inputs[f"{part}_mask"].sum(1).max()) for part in ("prompt", "completion"))
    inputs = dict(inputs)
    for key in ("prompt_ids", "prompt_mask"):
        inputs[key] = inputs[key][:, -prompt:]
    for key in ("completion_ids", "completion_mask", "old_per_token_logps"):
        inputs[key] = inputs[key][:, :completion]
    return inputs


def padded(spec: dict[str, Any]) -> Tensors:
    """The batch as TRL's `_generate_and_score_completions` gives it."""
    data = np.load(spec["batch"])
    starts = np.cumsum(data["completion_lengths"])[:-1]
    prompts = np.split(data["prompts"], np.cumsum(data["prompt_lengths"])[:-1])
    completions, old = np.split(data["completions"], starts), np.split(data["old_logprobs"], starts)
    rows, longest, longest_prompt = len(prompts), max(map(len, completions)), max(map(len, prompts))
    batch = {
        "prompt_ids": torch.zeros(rows, longest_prompt, dtype=torch.long),
        "prompt_mask": torch.zeros(rows, longest_prompt, dtype=torch.long),
        "completion_ids": torch.zeros(rows, longest, dtype=torch.long),
        "completion_mask": torch.zeros(rows, longest, dtype=torch.long),
        "old_per_token_logps": torch.zeros(rows, longest),
        "advantages": torch.from_numpy(data["advantages"]).float(),
    }
    for row, (prompt, completion, logprobs) in enumerate(zip(prompts, completions, old, strict=True)):
        batch["prompt_ids"][row, longest_prompt - len(prompt) :] = torch.from_numpy(prompt)
        batch["prompt_mask"][row, longest_prompt - len(prompt) :] = 1
        batch["completion_ids"][row, : len(completion)] = torch.from_numpy(completion)
        batch["completion_mask"][row, : len(completion)] = 1
        batch["old_per_token_logps"][row, : len(completion)] = torch.from_numpy(logprobs)
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    return {key: value.to(spec["device"]) for key, value in batch.items()}


def settings(spec: dict[str, Any], directory: Path) -> trl.GRPOConfig:
    """The same loss, clip, optimizer and precision as on our side."""
    return trl.GRPOConfig(
        output_dir=str(directory),
        use_cpu=spec["device"] == "cpu",
        bf16=spec["dtype"] == "bfloat16",
        per_device_train_batch_size=spec["rows"],
        gradient_accumulation_steps=spec["samples"] // spec["rows"],
        num_generations=spec["group"],
        max_completion_length=spec["longest"],
        max_steps=1_000_000,
        learning_rate=spec["lr"],
        lr_scheduler_type="constant",
        adam_beta1=spec["beta1"],
        adam_beta2=spec["beta2"],
        adam_epsilon=spec["eps"],
        weight_decay=0.0,
        max_grad_norm=spec["clip_grad"],
        loss_type="grpo",
        epsilon=spec["eps_clip"],
        beta=0.0,
        temperature=1.0,
        gradient_checkpointing=spec["recompute"],
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def main() -> None:
    # Whatever else is printed goes to the standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    # As TRL does by itself: float32 weights, and autocast.
    model = AutoModelForCausalLM.from_pretrained(
        spec["model"], dtype=getattr(torch, spec["master"]), attn_implementation="sdpa"
    )
    trainer = Trainer(
        model=model,
        args=settings(spec, Path(spec["batch"]).parent / "trl"),
        train_dataset=Dataset.from_list([{"prompt": "!"}] * spec["samples"]),
        processing_class=tokenizer,
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
    )
    trainer.prepare(padded(spec), Clock(spec["device"], answers), trim=spec["trim"])
    versions = {module.__name__: module.__version__ for module in (trl, transformers, torch)}
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    trainer.train()


if __name__ == "__main__":
    main()
