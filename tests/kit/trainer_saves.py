"""Checkpoints whose writers are struck by SIGKILL, line by line: real processes, real files, a few tensors.

`python -m tests.kit.trainer_saves DIRECTORY RANKS STRIDE` lets so many ranks save step 20 beside a checkpoint of step
10, over and over. Each time one of them is killed `STRIDE` lines later in what writes checkpoints, until it gets
through. Then they do it where there is a step 20 of an earlier epoch already. It prints a line of JSON for each time:
what became of the ranks, and what is loaded afterwards.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from services.common.config.models import TrainerConfig
from services.common.errors import UnavailableError
from services.common.versions import Version
from services.trainer import checkpoint, files, shards
from services.trainer.checkpoint import CheckpointState, CheckpointStore
from services.trainer.ranks.group import RankGroup
from tests.kit.in_process import free_port

TRACED = {str(Path(str(module.__file__))) for module in (checkpoint, files, shards)}
# Exit statuses of a rank that was not struck.
SAVED, LOST_ANOTHER, REFUSED = 0, 3, 4


def whole(version: Version) -> dict[str, dict[str, torch.Tensor]]:
    rows = torch.arange(15, dtype=torch.float32).reshape(5, 3) + 100 * version.epoch + version.step
    return {
        "model": {"w": rows, "norm": rows[0].clone()},
        "optimizer": {"exp_avg/w": rows * 2, "step/w": rows[0, 0].clone()},
        "critic": {"head": rows.to(torch.bfloat16)},
    }


def part(version: Version, rank: int, ranks: int) -> dict[str, dict[str, torch.Tensor]]:
    """Matrices are sharded, the rest is rank 0's."""
    share = -(-5 // ranks)
    own = slice(rank * share, rank * share + share)
    return {
        name: {
            key: (value[own].clone() if value.ndim > 1 else value)
            for key, value in tensors.items()
            if value.ndim > 1 or rank == 0
        }
        for name, tensors in whole(version).items()
    }


def state(version: Version) -> CheckpointState:
    return CheckpointState(version.step, version, version.step, "", "float32", "", None)


def save(root: Path, version: Version, rank: int, ranks: int, port: int, prepare: Callable[[], None]) -> int:
    """One rank's life. `prepare` is called when all are together."""
    config = TrainerConfig(ranks=ranks, rendezvous=f"127.0.0.1:{port}", rank_timeout_s=30.0)
    group, store = RankGroup.form(config, rank), CheckpointStore(root, 2)
    temporary = root / "checkpoints" / f"{files.TEMPORARY}{version}"
    prepare()
    try:
        if rank:
            shards.write_shards(temporary, part(version, rank, ranks), group.beside)
        else:
            store.save(state(version), part(version, rank, ranks), temporary, group.beside)
    except UnavailableError:
        return LOST_ANOTHER
    except OSError:
        return REFUSED
    return SAVED


def strike_at(line: int) -> Callable[[], None]:
    """From here on this process ends itself before it runs the n-th line of the modules that write checkpoints."""
    left = line

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return lambda: sys.settrace(trace)


def refuse() -> None:
    """From here on the system lets this process write no more than 100 bytes to a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


def together(
    root: Path, version: Version, ranks: int, struck: int = 0, prepare: Callable[[], None] = lambda: None
) -> list[int]:
    """The exit statuses of all ranks; `prepare` is for the one that is struck."""
    port, children = free_port(), []
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            sys.stderr = (root / f"rank-{rank}.log").open("w")
            os._exit(save(root, version, rank, ranks, port, prepare if rank == struck else lambda: None))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def outcome(root: Path) -> dict[str, Any]:
    """What a trainer that starts finds."""
    store = CheckpointStore(root, 2)
    store.clean()
    found = store.load_newest()
    if found is None:
        return {"loaded": None}
    expected = whole(found.state.version)
    same = found.tensors.keys() == expected.keys() and all(
        found.tensors[name].keys() == tensors.keys()
        and all(torch.equal(found.tensors[name][key][...], value) for key, value in tensors.items())
        for name, tensors in expected.items()
    )
    left = sorted(path.name for path in (root / "checkpoints").iterdir())
    return {"loaded": str(found.state.version), "whole": same, "steps": store.steps(), "left": left}


def main(directory: Path, ranks: int, stride: int) -> None:
    before = directory / "before"
    before.mkdir(parents=True)
    assert together(before, Version(1, 10), ranks) == [SAVED] * ranks
    for rank in range(ranks):
        for again in (False, True):
            for line in range(1, 10_000, stride):
                root = directory / f"{rank}-{again}-{line}"
                shutil.copytree(before, root)
                if again:
                    assert together(root, Version(1, 20), ranks) == [SAVED] * ranks
                statuses = together(root, Version(2, 20), ranks, rank, strike_at(line))
                print(json.dumps({"rank": rank, "again": again, "line": line, "statuses": statuses, **outcome(root)}))
                if statuses[rank] != -signal.SIGKILL:
                    break
        root = directory / f"{rank}-refused"
        shutil.copytree(before, root)
        statuses = together(root, Version(2, 20), ranks, rank, refuse)
        temporary = len(list((root / "checkpoints").glob(f"{files.TEMPORARY}*")))
        print(
            json.dumps({"rank": rank, "refused": True, "statuses": statuses, "temporary": temporary, **outcome(root)})
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
