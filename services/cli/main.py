"""The `polyhead` command. Each verb imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from services.cli import buffer_arguments, reward_arguments
from services.common.errors import PolyheadError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; the return value is the exit status. A typed error becomes one line on standard error."""
    arguments, rest = _parser().parse_known_args(_with_task(sys.argv[1:] if argv is None else argv))
    try:
        return int(arguments.verb(arguments, rest))
    except PolyheadError as error:
        print(f"polyhead: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="polyhead", description="Asynchronous RL post-training of language models as four decoupled services."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    up = verbs.add_parser("up", help="run what a TOML file describes, until it is done")
    up.add_argument("-c", "--config", type=Path, required=True, help="the run's TOML file")
    up.add_argument("--dry-run", action="store_true", help="check everything, print the resolved run, start nothing")
    up.set_defaults(verb=_up)

    train = verbs.add_parser(
        "train",
        help="the same from flags, slime's names accepted",
        usage="polyhead train --hf-checkpoint DIR --prompt-data FILE [--flag VALUE ...] [--section.key VALUE ...]",
    )
    train.add_argument("--dry-run", action="store_true", help="check everything, print the resolved run, start nothing")
    train.add_argument("--list-flags", action="store_true", help="print every flag and the key it sets")
    train.set_defaults(verb=_train)

    status = verbs.add_parser("status", help="ask a running system how it is")
    status.add_argument("run_dir", type=Path, nargs="?", default=None, help="default: the newest run under runs/")
    status.set_defaults(verb=_status)

    down = verbs.add_parser("down", help="stop a running system; it can be resumed")
    down.add_argument("run_dir", type=Path, nargs="?", default=None, help="default: the newest run under runs/")
    down.set_defaults(verb=_down)

    scale = verbs.add_parser("scale", help="more or fewer replicas while a run goes on")
    scale.add_argument("requests", metavar="ROLE=N", nargs="+", help="rollout=N, reward=N or both")
    scale.add_argument("--run-dir", type=Path, default=None, help="default: the newest run under runs/")
    scale.set_defaults(verb=_scale)

    bench = verbs.add_parser("bench", help="measure a part of the system on this machine; needs a checkout")
    bench.add_argument("name", help="rollout, ...: tests/bench/bench_<name>.py")
    bench.set_defaults(verb=_bench)

    buffer = verbs.add_parser("buffer", help="look into a run's mailboxes, requeue, export, import")
    buffer_arguments.add_to(buffer)
    buffer.set_defaults(verb=_buffer)

    reward = verbs.add_parser("reward", help="try a scorer on the rows of a file")
    reward_arguments.add_to(reward)
    reward.set_defaults(verb=_reward)

    convert = verbs.add_parser("convert", help="a checkpoint as a Hugging Face directory")
    convert.add_argument("checkpoint", type=Path, metavar="CHECKPOINT_DIR", help="RUN_DIR/checkpoints/step_00000020")
    convert.add_argument("out", type=Path, metavar="OUT", help="the directory to make")
    convert.add_argument(
        "--hf-checkpoint", type=Path, metavar="DIR", help="the model that the run began with, if it has moved"
    )
    convert.add_argument("--adapter", action="store_true", help="only the adapters (trainer.lora), as peft's directory")
    convert.set_defaults(verb=_convert)

    demo = verbs.add_parser("demo", help="a language model learns addition on this machine, in two minutes")
    demo.add_argument("task", nargs="?", choices=("addition", "smollm2"), default="addition")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(verb=_demo)
    return parser


def _up(arguments: argparse.Namespace, rest: list[str]) -> int:
    from services.cli.run import run
    from services.common.config import load, parse_overrides

    return run(load(arguments.config, parse_overrides(rest)), dry_run=arguments.dry_run)


def _train(arguments: argparse.Namespace, rest: list[str]) -> int:
    from services.cli import slime_flags
    from services.cli.run import run
    from services.common.config import load

    if arguments.list_flags:
        print(slime_flags.describe())
        return 0
    return run(load(None, slime_flags.to_overrides(rest)), dry_run=arguments.dry_run)


def _status(arguments: argparse.Namespace, rest: list[str]) -> int:
    from services.cli.status import print_status

    _refuse_rest(rest)
    return print_status(arguments.run_dir)


def _down(arguments: argparse.Namespace, rest: list[str]) -> int:
    from services.cli.status import stop_run

    _refuse_rest(rest)
    return stop_run(arguments.run_dir)


def _scale(arguments: argparse.Namespace, rest: list[str]) -> int:
    from services.cli.scale import ask

    _refuse_rest(rest)
    return ask(arguments.run_dir, arguments.requests)


def _with_task(argv: Sequence[str]) -> list[str]:
    """`demo --section.key value` names no task; argparse would take the value for one."""
    named = len(argv) > 1 and not (argv[1].startswith("-") and argv[1] not in ("-h", "--help"))
    return [*argv] if argv[:1] != ["demo"] or named else ["demo", "addition", *argv[1:]]


def _bench(arguments: argparse.Namespace, rest: list[str]) -> int:
    from services.cli.bench import run_bench

    return run_bench(arguments.name, rest)


def _buffer(arguments: argparse.Namespace, rest: list[str]) -> int:
    from services.cli import buffer_tools

    _refuse_rest(rest)
    return buffer_tools.run(arguments)


def _reward(arguments: argparse.Namespace, rest: list[str]) -> int:
    from services.cli import reward_test

    _refuse_rest(rest)
    return reward_test.run(arguments)


def _convert(arguments: argparse.Namespace, rest: list[str]) -> int:
    from services.trainer.convert import convert

    _refuse_rest(rest)
    state = convert(arguments.checkpoint, arguments.out, arguments.hf_checkpoint, adapter=arguments.adapter)
    print(f"{arguments.out}: {state.version}, step {state.step}")
    return 0


def _demo(arguments: argparse.Namespace, rest: list[str]) -> int:
    from services.cli.demo import addition, smollm2
    from services.common.config import parse_overrides

    task = smollm2 if arguments.task == "smollm2" else addition
    return task.run(arguments.seed, parse_overrides(rest))


def _refuse_rest(rest: list[str]) -> None:
    if rest:
        raise PolyheadError("unknown argument", field=rest[0])


if __name__ == "__main__":
    sys.exit(main())
