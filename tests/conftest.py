"""Collecting imports torch and transformers and makes thousands of tests: no garbage of that is looked for."""

from __future__ import annotations

import gc

import pytest

from services.common.process import keep_loaded


def pytest_configure(config: pytest.Config) -> None:
    # Where workers collect, this process does not, and is never told that they are done.
    if config.getoption("numprocesses", None) is None:
        gc.disable()


def pytest_collection_finish() -> None:
    keep_loaded()
    gc.enable()
