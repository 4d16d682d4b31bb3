from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.systems import small_flags, small_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny random model and a prompt file."""
    return small_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def flags(inputs: Path) -> list[str]:
    return small_flags(inputs)
