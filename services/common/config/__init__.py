"""The run's configuration: `Config`, and `load` to get one from a TOML file, overrides and the environment."""

from services.common.config.loader import Config, dump, load, parse_overrides

__all__ = ["Config", "dump", "load", "parse_overrides"]
