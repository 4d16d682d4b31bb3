"""The engine's command line."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_DEFAULT_CONTEXT = 2048
ADMIN_KEY_VARIABLE = "POLYHEAD_ENGINE_ADMIN_KEY"


@dataclass(frozen=True)
class EngineOptions:
    """Everything that can be set at start. Names follow SGLang's flags where it has one."""

    model_path: Path
    port: int
    host: str = "127.0.0.1"
    max_running_requests: int = 64
    """Slots of the batch; more requests wait."""
    context_length: int | None = None
    """Tokens of KV cache per slot. None: the model's own, at most 2,048."""
    prefill_chunk: int = 32
    """Prompt tokens of one request processed per step; rounded up to a multiple of four."""
    stream_interval: int = 8
    """Tokens between two events of a stream."""
    incremental_streaming_output: bool = False
    """Events of a stream carry only what is new; otherwise everything so far."""
    threads: int = 1
    dtype: str = "float32"
    admin_api_key: str | None = None
    weight_version: str = "default"
    random_seed: int = 0
    enable_deterministic_inference: bool = False
    """Fixed shapes: a request's tokens and log-probs do not depend on its neighbours, bit for bit."""
    skip_tokenizer_init: bool = False
    """No text in and out, no stop strings; answers cost less."""
    decode_rate: float | None = None
    """At most this many tokens per second and request: stands for a slower engine."""
    enable_memory_saver: bool = False
    """Weights and KV cache can be given up, and taken back."""
    shared_weights_dir: Path | None = None
    """Where weights may be read from that another process shares; nowhere by default."""
    log_requests: bool = False
    """A line when a request starts and one when it ends."""


def parse_options(arguments: Sequence[str] | None = None) -> EngineOptions:
    """Reads the command line; exits with status 2 and one line when it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m services.rollout.engines.torch_engine", description=__doc__)
    parser.add_argument("--model-path", type=Path, required=True, help="a Hugging Face model directory")
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one, named in the log")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--max-running-requests", type=_positive, default=64)
    parser.add_argument("--context-length", type=_positive, help="KV cache per request (model's own, at most 2048)")
    parser.add_argument("--prefill-chunk", type=_positive, default=32)
    parser.add_argument("--stream-interval", type=_positive, default=8)
    parser.add_argument("--incremental-streaming-output", action="store_true")
    parser.add_argument("--threads", type=_positive, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    # Everybody on the machine can read a command line.
    parser.add_argument(
        "--admin-api-key", default=os.environ.get(ADMIN_KEY_VARIABLE), help=f"better given as {ADMIN_KEY_VARIABLE}"
    )
    parser.add_argument("--weight-version", default="default")
    parser.add_argument("--random-seed", type=int, default=0)
    parser.add_argument("--enable-deterministic-inference", action="store_true")
    parser.add_argument("--skip-tokenizer-init", action="store_true")
    parser.add_argument("--decode-rate", type=_positive_number, help="tokens per second and request (no limit)")
    parser.add_argument("--enable-memory-saver", action="store_true", help="its memory can be given up for a while")
    parser.add_argument("--shared-weights-dir", type=Path, help="memory that a trainer shares is read from here only")
    parser.add_argument("--log-requests", action="store_true")
    return EngineOptions(**vars(parser.parse_args(arguments)))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def _positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value
