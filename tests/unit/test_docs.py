"""What the pages say can be followed: links lead somewhere, verbs and flags exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from services.cli import slime_flags
from services.cli.main import _parser
from services.common.config import load, parse_overrides

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_verbs_exist(page):
    verbs = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][a-z0-9-]+)", page.read_text())) <= verbs | {"sure", "and"}


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_commands_parse(name):
    text = (ROOT / name).read_text().replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("polyhead ")]
    assert {command[1] for command in commands} == {"up", "train", "status", "down"}
    for command in commands:
        arguments, rest = _parser().parse_known_args(command[1:])
        if command[1] == "train":
            load(None, slime_flags.to_overrides(rest))
        elif command[1] == "up":
            assert (ROOT / arguments.config).exists()
            load(ROOT / arguments.config, parse_overrides(rest))
        else:
            assert rest == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("deploy/config/*.toml")), ids=lambda path: path.name)
def test_shipped_configurations_load(path):
    load(path)
