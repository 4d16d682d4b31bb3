"""The arguments of `polyhead buffer`. Imports nothing heavy: it is read whenever the command is."""

from __future__ import annotations

import argparse
from pathlib import Path

STATES = ("pending", "generating", "generated", "scoring", "scored", "ready", "training", "consumed", "dead")


def add_to(parser: argparse.ArgumentParser) -> None:
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        tool = tools.add_parser(name, help=text, description=text)
        where = tool.add_mutually_exclusive_group()
        where.add_argument("--run", type=Path, metavar="DIR", help="a run's directory; default: the newest under runs/")
        where.add_argument("--address", help="where the buffer listens, instead")
        return tool

    add("ledger", "where every sample is, by state and reason")

    peek = add("peek", "look at samples of a state")
    peek.add_argument("state", choices=STATES)
    peek.add_argument("--limit", type=int, default=5, help="samples to show (%(default)s)")
    peek.add_argument("--chars", type=int, default=200, help="characters of text to show (%(default)s)")

    dead = add("dead", "read dead letters, the oldest first")
    dead.add_argument("--limit", type=int, default=100, help="letters to show (%(default)s)")

    requeue = add("requeue", "give dead samples another chance")
    which = requeue.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every dead letter that can be requeued")
    which.add_argument("--ids", nargs="+", metavar="SAMPLE_ID")

    export = add("export", "write samples of a state to a file, a group a record")
    export.add_argument("state", choices=STATES)
    export.add_argument("file", type=Path, help="FILE.jsonl (readable) or FILE.pb (length-delimited messages)")

    take = add("import", "accept what export wrote: groups with samples as they are, records without any as prompts")
    take.add_argument("file", type=Path, help="FILE.jsonl or FILE.pb; the same file again continues where it stopped")
