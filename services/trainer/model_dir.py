"""The Hugging Face directory the run starts from, and the one it leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import orjson
import xxhash

from services.common.errors import ConfigError
from services.common.versions import Version
from services.trainer.files import digest, write_directory

FIELD = "model.hf_checkpoint"
EXPORT_RECORD = "polyhead.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


def check_model_dir(directory: Path) -> None:
    """Raises ConfigError when something that a run needs is not there. Loads nothing and writes nothing."""
    if directory == Path():
        raise ConfigError("is not set: the directory of a Hugging Face model is needed", field=FIELD)
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory", field=FIELD)
    try:
        orjson.loads((directory / "config.json").read_bytes())
    except OSError as error:
        raise ConfigError(f"{directory / 'config.json'} cannot be read: {error.strerror}", field=FIELD) from error
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{directory / 'config.json'} is not JSON: {error}", field=FIELD) from error
    if not any(directory.glob("*.safetensors")):
        raise ConfigError(f"{directory} holds no *.safetensors", field=FIELD)
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(f"{directory} holds no tokenizer ({', '.join(_TOKENIZER_FILES)})", field=FIELD)


def weights_digest(directory: Path) -> str:
    """Of the names and the content of a directory's safetensors: against another model, not against an adversary."""
    paths = sorted(directory.glob("*.safetensors"))
    with ThreadPoolExecutor(thread_name_prefix="digest") as threads:
        found = threads.map(digest, paths)
        lines = [f"{path.name} {content}\n" for path, content in zip(paths, found, strict=True)]
    return str(xxhash.xxh3_128_hexdigest("".join(lines).encode()))


def exported_version(target: Path) -> Version | None:
    """The version that an exported directory holds; None when there is none, or it does not say."""
    try:
        return Version.parse(orjson.loads((target / EXPORT_RECORD).read_bytes())["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def export(target: Path, source: Path, version: Version, save_model: Callable[[Path], None]) -> None:
    """Writes a directory that transformers loads, atomically: the trained model, and the tokenizer of `source`.

    `save_model` writes config, generation config and safetensors of `version`. Of `source`, every other file that is
    not a weight is copied.
    """

    def fill(directory: Path) -> None:
        save_model(directory)
        copy_beside_weights(source, directory)
        record = {"step": version.step, "version": str(version)}
        (directory / EXPORT_RECORD).write_bytes(orjson.dumps(record))

    write_directory(target, fill)


def copy_beside_weights(source: Path, directory: Path) -> None:
    """Copies every file of a model's directory that is neither a weight nor in `directory` already."""
    written = {path.name for path in directory.iterdir()}
    for path in source.iterdir():
        weight = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and path.name not in written and not weight:
            shutil.copyfile(path, directory / path.name)
