"""What a Hugging Face model directory holds, read from its config.json and the headers of its safetensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.errors import ConfigError

FIELD = "model.hf_checkpoint"
BLOCK = 128
"""Rows and columns of the block of an fp8 weight that shares a scale; those at the edges may be smaller."""
SCALE_SUFFIX = "_scale_inv"
"""After the name of an fp8 weight: the name of its scales. A weight is its fp8 values times these."""
_FP8 = "F8_E4M3"
_HEADER_MAX = 100 << 20


@dataclass(frozen=True)
class StoredTensor:
    dtype: str
    """As safetensors names it: "F32", "BF16", "F8_E4M3"."""
    shape: tuple[int, ...]


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor by its name; none when there are no safetensors. Raises ConfigError for a broken file."""
    tensors: dict[str, StoredTensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors.update(_header(path))
    return tensors


def _header(path: Path) -> dict[str, StoredTensor]:
    """Format: 8 bytes little-endian header length, then a JSON object of name to dtype, shape and offsets."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _HEADER_MAX:
                raise ValueError(f"a header of {length} bytes")
            entries = json.loads(file.read(length))
        return {
            name: StoredTensor(entry["dtype"], tuple(entry["shape"]))
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, struct.error, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a safetensors file: {error}", field=FIELD) from error


def fp8_weights(directory: Path) -> frozenset[str]:
    """Names of the weights that the directory holds in fp8, each with its scales beside it; none in a plain one.

    A directory is one of fp8 by the `quantization_config` of its config.json, and has to be block-wise: e4m3 with a
    float scale for each 128 × 128 block, activations quantised as they come. Raises ConfigError for any other.
    """
    check_quantisation(_config(directory))
    stored = stored_tensors(directory)
    names = {name for name in stored if name + SCALE_SUFFIX in stored}
    for name in names:
        weight, scales = stored[name], stored[name + SCALE_SUFFIX]
        if weight.dtype != _FP8 or len(weight.shape) != 2 or scales.shape != scale_shape(weight.shape):
            held = f"{weight.dtype} {list(weight.shape)} with scales {list(scales.shape)}"
            raise ConfigError(f"{name} is {held}, not {_FP8} with a scale for each {BLOCK} × {BLOCK}", field=FIELD)
    return frozenset(names)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Of the scales of a weight [n, k]: [ceil(n / 128), ceil(k / 128)]."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def check_quantisation(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says fp8. Raises ConfigError for a quantisation that weights cannot be pushed in."""
    said = config.get("quantization_config")
    if not said:
        return False
    wanted: dict[str, object] = {
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
    }
    wanted |= {"scale_fmt": None, "fmt": said.get("fmt") and "e4m3"}
    for name, value in wanted.items():
        if said.get(name) != value:
            raise ConfigError(f"quantization_config.{name} = {said.get(name)!r}: only {value!r} is known", field=FIELD)
    return True


def _config(directory: Path) -> Mapping[str, Any]:
    """An empty one where there is none."""
    path = directory / "config.json"
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", field=FIELD) from error
    return content if isinstance(content, dict) else {}
