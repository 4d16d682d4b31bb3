"""Fixtures of the rollout's unit tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from services.common.config import Config
from services.rollout.prompting import Prompter
from tests.kit import warm
from tests.kit.rollout_rig import Rig, changed, running_rig

MakeRig = Callable[..., Awaitable[Rig]]


@pytest.fixture(scope="session")
def warm_engine() -> None:
    warm.warm().prepare(warm.ENGINE)


@pytest.fixture(autouse=True)
def engines_start_warm(warm_engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.rollout.engines.child.spawn", warm.spawn)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 directory with a character-level tokenizer."""
    from tests.kit.tiny_model import build_tiny_qwen3

    return build_tiny_qwen3(tmp_path_factory.mktemp("rollout") / "tiny")


@pytest.fixture(scope="session")
def base_config(tiny_model: Path) -> Config:
    return Config.model_validate(
        {
            "model": {"hf_checkpoint": tiny_model},
            "batch": {"rollout_batch_size": 4, "n_samples_per_prompt": 4},
            "rollout": {
                "max_inflight": 16,
                "save_interval_s": 0.05,
                "sampling": {"max_response_len": 10},
            },
            "trainer": {"weights": {"timeout_s": 1.0}},
        }
    )


@pytest.fixture(scope="session")
def prompter(base_config: Config) -> Prompter:
    return Prompter(base_config)


@pytest.fixture
async def make_rig(base_config: Config, prompter: Prompter) -> AsyncIterator[MakeRig]:
    """Builds a running rig; keyword arguments override rollout settings."""
    async with AsyncExitStack() as stack:

        async def make(
            *, serving: bool = True, engines: int = 1, sampling: dict[str, Any] | None = None, **settings: Any
        ) -> Rig:
            config = changed(base_config, sampling=sampling, **settings)
            own = Prompter(config) if sampling else prompter
            return await stack.enter_async_context(running_rig(config, own, serving=serving, engines=engines))

        yield make
