"""Stands in for SGLang's compiled kernels, of which no CPU build is published.

SGLang imports some of them by name when it starts (speculative decoding, copies of the KV cache), and calls none for a
dense model, or for Qwen3-MoE and Mixtral, with torch's own attention. Every name can be imported here; calling it is an
error that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU build; SGLang needs a GPU for what called it")

    return missing
