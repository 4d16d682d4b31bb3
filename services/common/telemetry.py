"""Logs: one JSON object a line, with the service's name on each."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog


def configure_logging(role: str, index: int = 0, level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Logs to `stream`, by default standard error. Prompts and completions never go into a log line; sample ids do."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(stream or sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=f"{role}-{index}")
