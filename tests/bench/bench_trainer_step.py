"""Milliseconds per training step of the demo's model size: 64 samples of about 10 tokens, one thread.

Run with ``PYTHONPATH=.:protos OMP_NUM_THREADS=1 python tests/bench/bench_trainer_step.py``.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from services.common.config import Config
from services.common.versions import Version
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.batch.samples import decode_groups
from services.trainer.batch.staleness import Clock
from services.trainer.step import train_batch
from services.trainer.weights.snapshot import MIB, Snapshot, build_manifest
from tests.kit.tiny_model import build_tiny_qwen3
from tests.kit.trainer_batch import make_batch

ROUNDS = 50


def measure(name: str, work: Callable[[], object]) -> None:
    for _ in range(5):
        work()
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    print(f"{name:32} min {min(seconds) * 1e3:6.2f} ms   median {statistics.median(seconds) * 1e3:6.2f} ms")


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        shape = {"intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = build_tiny_qwen3(Path(directory) / "m", hidden=128, **shape)
        config = Config(model={"hf_checkpoint": model})
        backend = TorchBackend(config)
        print(f"{sum(weight.numel() for weight in backend.weights().values()):,} parameters, 64 samples")
        groups = make_batch(0, groups=8, size=8, prompt_length=6, longest=6)
        samples = decode_groups(groups, vocab_size=backend.vocab_size)
        clock = Clock(Version(1, 0), {1: 0})
        snapshot = Snapshot(build_manifest(backend.weights(), 64 * MIB), backend.model.device)
        measure("decode", lambda: decode_groups(groups, vocab_size=backend.vocab_size))
        measure("pack, forward, backward, step", lambda: train_batch(backend, samples, clock, config))
        measure("snapshot for the push", lambda: snapshot.fill(backend.tensors()))
        measure("copy of the state for a save", backend.state)


if __name__ == "__main__":
    main()
