"""Reward functions as users write them, good and bad, for the tests of the reward service."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from services.reward.scorers.base import Item, Scorer
from services.reward.scorers.builtin import Options, load_builtin


async def by_order(args: Any, sample: Any, **kwargs: Any) -> Any:
    """Does what the completion says: one function for all the ways a score can end."""
    word, _, rest = sample.response.partition(" ")
    if word == "sleep":
        await asyncio.sleep(float(rest))
    elif word == "until":
        while not _is_there(rest):
            await asyncio.sleep(0.01)
    elif word == "hang":
        while True:
            pass
    elif word == "wait":
        await asyncio.Event().wait()
    elif word == "raise":
        raise ValueError(f"cannot\nscore {rest}")
    elif word == "exit":
        sys.exit(3)
    elif word == "die":
        os._exit(7)
    elif word == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif word == "orphan":
        subprocess.Popen(["sleep", "61.25"])  # noqa: ASYNC220
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "nan":
        return float("nan")
    elif word == "none":
        return None
    elif word == "text":
        return "1.0"
    elif word == "numpy":
        return np.float32(0.25)
    elif word == "dict":
        return {"score": 0.5, "acc": True, "pred": "not a number", "length": np.int64(3)}
    elif word == "reward":
        return {"reward": 0.75}
    elif word == "empty":
        return {}
    elif word == "bad_part":
        return {"score": 1.0, "kl": float("inf")}
    elif word == "pid":
        return os.getpid()
    elif word == "print":
        print("a user's function prints what it likes")
    return 1.0


def _is_there(path: str) -> bool:
    return Path(path).exists()


async def by_type(args: Any, sample: Any, **kwargs: Any) -> Any:
    """Two scorers in one function: the real one of mathematics, and the one above."""
    if sample.metadata.get("rm_type") != "math":
        return await by_order(args, sample)
    return _math()(Item("", "", "", sample.response, sample.label or "", "", "completed", 0, 0, 0)).reward


@cache
def _math() -> Scorer:
    return load_builtin("math", Options())


async def ranks(args: Any, samples: list[Any], **kwargs: Any) -> Any:
    """Scores a group: how many samples are shorter. Does what any completion's first word says."""
    words = [sample.response.partition(" ")[0] for sample in samples]
    if "raise" in words:
        raise ValueError("cannot rank")
    if "hang" in words:
        while True:
            pass
    if "sleep" in words:
        await asyncio.sleep(0.4)
    if "one" in words:
        return [1.0]
    if "number" in words:
        return 1.0
    if "text" in words:
        return "1" * len(samples)
    lengths = [len(sample.response) for sample in samples]
    ranking = [sum(other < length for other in lengths) for length in lengths]
    if "nan" in words:
        return [float("nan") if word == "nan" else 1.0 for word in words]
    return [{"score": place, "group": len(samples), "index": samples[at].index} for at, place in enumerate(ranking)]


def ranks_as_array(args: SimpleNamespace, samples: list[Any]) -> Any:
    return np.arange(len(samples)) / 4


def steps(args: Any, sample: Any, **kwargs: Any) -> Any:
    """Rewards the halves of the completion, and says what tokens it saw; does what the completion says."""
    prompt = len(sample.tokens) - sample.response_length
    half = sample.response_length // 2
    spans: Any = [[0, half, 0.25], (np.int64(half), sample.response_length, np.float32(0.5))]
    if sample.response.startswith("spans "):
        spans = json.loads(sample.response.removeprefix("spans "))
    return {"score": 1.0, "spans": spans, "prompt": prompt, "first": sample.tokens[prompt] if sample.tokens else -1}


async def steps_of_group(args: Any, samples: list[Any], **kwargs: Any) -> Any:
    return [{"score": sample.index, "spans": [[0, sample.response_length, sample.index]]} for sample in samples]


def plain(args: SimpleNamespace, sample: Any) -> float:
    """A function that is not async and takes no further arguments."""
    return float(sample.response == sample.label)


def sees(args: Any, sample: Any, **kwargs: Any) -> dict[str, float]:
    """Gives back what it was given, as numbers."""
    return {
        "score": float(sample.metadata["difficulty"]),
        "messages": len(sample.prompt),
        "index": sample.index,
        "group_index": sample.group_index,
        "response_length": sample.response_length,
        "truncated": sample.status == "truncated",
        "no_label": sample.label is None,
        "group_size": args.n_samples_per_prompt,
    }


def keeps_by_label(args: Any, group: list[Any]) -> Any:
    """A filter that does what the first sample's completion says."""
    rewards = [sample.get_reward_value(args) for sample in group]
    word = group[0].response
    if word == "spread":
        return SimpleNamespace(keep=bool(np.std(rewards) > 0), reason="no_spread", keep_when_insufficient=False)
    if word == "rather not":
        return SimpleNamespace(keep=False, reason="rather", keep_when_insufficient=True)
    if word == "hang":
        while True:
            pass
    if word == "raise":
        raise ValueError("cannot judge")
    if word == "none":
        return None
    if word == "die":
        os._exit(7)
    return np.mean(rewards) > 0.5


async def keeps_later(args: Any, group: list[Any]) -> bool:
    await asyncio.sleep(0)
    return len(group) == args.n_samples_per_prompt and group[0].reward["acc"] == 1.0


def alternates(args: Any, sample: Any, **kwargs: Any) -> dict[str, float]:
    """0 and 1 in turn, unless the completion is "same"."""
    return {"score": 1.0 if sample.response == "same" else float(sample.index % 2), "acc": 1.0}


def newest_first(args: Any, rollout_id: Any, buffer: list[list[Any]], num_samples: int) -> list[list[Any]]:
    """A buffer filter; like slime's, it takes what it returns out of the buffer."""
    assert rollout_id is None
    assert buffer[0][0].status == "aborted"
    assert buffer[0][0].metadata["start_rollout_id"] == 0
    assert buffer[0][0].tokens == [5]
    chosen = sorted(buffer, key=lambda group: -group[0].group_index)[:num_samples]
    for group in chosen:
        buffer.remove(group)
    return chosen


def cannot_choose(args: Any, rollout_id: Any, buffer: list[list[Any]], num_samples: int) -> list[list[Any]]:
    raise ValueError("cannot choose")


def never_chooses(args: Any, rollout_id: Any, buffer: list[list[Any]], num_samples: int) -> None:
    time.sleep(600)


async def shapes(args: Any, sample: Any, reward: float) -> Any:
    """Halves a reward; what the completion says otherwise is no reward."""
    await asyncio.sleep(0)
    if sample.response == "refuse":
        return None
    return reward / 2 - (0.25 if reward.parts.get("acc") else 0)


def takes_nothing() -> float:
    """Does not fit slime's signature."""
    return time.time()


not_a_function = 3
