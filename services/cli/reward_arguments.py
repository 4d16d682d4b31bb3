"""The arguments of `polyhead reward`. Imports nothing heavy: it is read whenever the command is."""

from __future__ import annotations

import argparse
from pathlib import Path

EXPECTED = "reward"


def add_to(parser: argparse.ArgumentParser) -> None:
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    text = "score the rows of a file: what each gets or why it gets nothing, the time it takes, disagreements"
    test = tools.add_parser("test", help=text, description=text)
    what = test.add_mutually_exclusive_group(required=True)
    what.add_argument("--scorer", help='as in reward.scorer: "math", "exact", pkg.mod:fn, ...')
    what.add_argument(
        "-c",
        "--config",
        type=Path,
        metavar="FILE.toml",
        help="the rewards of a run: weights, shaping, whole groups, a reward model elsewhere, with its time limit",
    )
    test.add_argument(
        "--file",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help='an object a line: "completion" or "response", "label", and if need be "prompt" (text or messages) and '
        '"metadata"; whole groups are rows one after the other with the same "group", else with the same prompt',
    )
    test.add_argument(
        "--expect", metavar="COLUMN", help=f'the column of rewards to compare with; default: "{EXPECTED}", if any'
    )
    test.add_argument("--path", type=Path, action="append", default=[], help="where a user's module is; repeatable")
    test.add_argument("--processes", type=int, default=1, help="of the pool (%(default)s)")
    test.add_argument("--timeout", type=float, metavar="S", help="of a score; default: the run's, else 10")
    test.add_argument("--problems", action="store_true", help="list only rows that fail or disagree")
    test.add_argument("--json", action="store_true", help="print everything as JSON instead of a table")
