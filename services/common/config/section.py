"""What every table of the configuration is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A table of the file: unknown keys are errors, strings are not coerced into numbers."""

    model_config = ConfigDict(extra="forbid", strict=False, use_attribute_docstrings=True)
