"""What a checkpoint of adapters says besides their weights, and when it may not be gone on from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from services.common.config.lora import FIELD, LoraConfig
from services.common.errors import ConfigError
from services.trainer import model_dir
from services.trainer.backends.torch.lora import Adapters

_ALL = "all weights"


@dataclass(frozen=True)
class LoraState:
    """What the adapters are added to, and how."""

    rank: int
    alpha: int
    use_rslora: bool
    target_modules: list[str]
    base: str
    """`model_dir.weights_digest` of the directory that training began with."""

    def settings(self) -> LoraConfig:
        return LoraConfig(**{name: value for name, value in asdict(self).items() if name != "base"})


def lora_state(adapters: Adapters | None, base: Path) -> LoraState | None:
    """None where all weights are trained. Reads all of the `base` directory's."""
    if adapters is None:
        return None
    own = adapters.settings
    return LoraState(own.rank, own.alpha, own.use_rslora, adapters.targets, model_dir.weights_digest(base))


def check_same(own: LoraState | None, saved: LoraState | None, base_field: str) -> None:
    """Raises ConfigError, naming the key, when a run goes on from a checkpoint of something else than it trains.

    `base_field` is the key of the model that the run begins with.
    """
    if own is None or saved is None:
        if own is not saved:
            has = _ALL if saved is None else f"adapters of rank {saved.rank}"
            wants = _ALL if own is None else f"adapters of rank {own.rank}"
            raise ConfigError(f"the run's checkpoints are of {has}, and this run trains {wants}", field=f"{FIELD}.rank")
        return
    for name, value in asdict(own).items():
        before = getattr(saved, name)
        if name == "base" and value != before:
            raise ConfigError(
                "holds other weights than those that the run's adapters were trained on", field=base_field
            )
        if value != before:
            raise ConfigError(f"the run's checkpoints have {before}, and this run {value}", field=f"{FIELD}.{name}")
