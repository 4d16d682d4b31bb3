"""Collecting imports torch and transformers and makes thousands of tests: no garbage of that is looked for."""

from __future__ import annotations

import gc

from services.common.process import keep_loaded


def pytest_configure() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    keep_loaded()
    gc.enable()
