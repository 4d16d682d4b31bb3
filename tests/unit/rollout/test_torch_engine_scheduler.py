"""Continuous batching without HTTP: determinism, retraction, version spans, slots."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.rollout.engines.torch_engine.engine import Engine
from services.rollout.engines.torch_engine.options import EngineOptions
from services.rollout.engines.torch_engine.scheduler import Scheduler
from services.rollout.engines.torch_engine.sequence import Delta, Sequence
from tests.kit.hf_reference import load_reference, teacher_forced
from tests.kit.tiny_model import build_tiny_qwen3

PROMPT = list(range(10, 31))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen3(tmp_path_factory.mktemp("model"))


class Bench:
    """An engine's parser and scheduler, stepped by the test."""

    def __init__(self, model: Path, **options: Any) -> None:
        self.deltas: list[Delta] = []
        fields = {"max_running_requests": 8, "context_length": 96, "prefill_chunk": 8, **options}
        self._engine = Engine(EngineOptions(model_path=model, port=0, **fields))
        self.scheduler: Scheduler = self._engine.scheduler
        self.scheduler._deliver = self.deltas.extend

    def add(self, prompts: list[list[int]], rid: str = "r", stream: bool = False, **params: Any) -> list[Sequence]:
        body = {"input_ids": prompts, "rid": rid, "return_logprob": True, "stream": stream, "sampling_params": params}
        sequences = self._engine.parser.parse(body).sequences
        self.scheduler.add(sequences)
        return sequences

    def step(self, times: int) -> None:
        with torch.inference_mode():
            for _ in range(times):
                self.scheduler.step()

    def finish(self) -> None:
        with torch.inference_mode():
            while self.scheduler.has_work:
                self.scheduler.step()

    def result(self, sequence: Sequence) -> tuple[list[int], list[float]]:
        mine = [delta for delta in self.deltas if delta.sequence is sequence]
        assert [delta.finish_reason is None for delta in mine] == [True] * (len(mine) - 1) + [False]
        return _joined(delta.token_ids for delta in mine), _joined(delta.logprobs for delta in mine)


def _joined(parts: Iterable[list[Any]]) -> list[Any]:
    return [item for part in parts for item in part]


@pytest.mark.parametrize("slots", [1, 8, 12])
def test_deterministic_mode_does_not_see_neighbours_slots_or_arrival(model: Path, slots: int) -> None:
    params = {"temperature": 1.0, "sampling_seed": 11, "max_new_tokens": 40, "ignore_eos": True}
    options = {"enable_deterministic_inference": True, "max_running_requests": slots}
    alone = Bench(model, **options)
    mine = alone.add([PROMPT], **params)
    alone.finish()
    expected = alone.result(mine[0])
    random = np.random.default_rng(0)
    for trial in range(4):
        crowd = Bench(model, **options)
        for number in range(int(random.integers(1, 14))):
            prompt = random.integers(3, 128, int(random.integers(1, 40))).tolist()
            fields = [{"temperature": 0}, {"top_p": 0.5}, {"temperature": 0.3, "top_k": 4}, {}][number % 4]
            crowd.add([prompt], f"n{number}", max_new_tokens=int(random.integers(1, 50)), **fields)
            crowd.step(int(random.integers(0, 4)))
        mine = crowd.add([PROMPT], f"mine{trial}", **params)
        crowd.step(3)
        crowd.add([[5, 6, 7]] * 9, "late", max_new_tokens=30)
        crowd.finish()
        assert crowd.result(mine[0]) == expected


def test_a_seed_makes_a_completion_repeatable_and_resumable(model: Path) -> None:
    bench = Bench(model)
    params = {"temperature": 1.0, "max_new_tokens": 30, "ignore_eos": True}
    first, again = (
        bench.add([PROMPT], "a", sampling_seed=5, **params),
        bench.add([PROMPT], "b", sampling_seed=5, **params),
    )
    other = bench.add([PROMPT], "c", sampling_seed=6, **params)
    bench.finish()
    tokens, logprobs = bench.result(first[0])
    assert bench.result(again[0])[0] == tokens != bench.result(other[0])[0]
    resumed = bench.add([PROMPT + tokens[:12]], "d", sampling_seed=5, **{**params, "max_new_tokens": 18})
    bench.finish()
    assert bench.result(resumed[0])[0] == tokens[12:]
    assert bench.result(resumed[0])[1] == pytest.approx(logprobs[12:], abs=1e-4)


def test_without_a_seed_completions_differ_and_the_engines_seed_repeats_them(model: Path) -> None:
    runs = []
    for _ in range(2):
        bench = Bench(model, random_seed=3)
        sequences = bench.add([PROMPT] * 2, max_new_tokens=20, ignore_eos=True)
        bench.finish()
        runs.append([bench.result(sequence)[0] for sequence in sequences])
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_retraction_keeps_what_was_generated(model: Path, steps: int) -> None:
    bench = Bench(model)
    params = {"temperature": 1.0, "sampling_seed": 1, "max_new_tokens": 20, "ignore_eos": True}
    expected = bench.add([PROMPT, PROMPT[:3]], "a", **params)
    bench.finish()
    sequences = bench.add([PROMPT, PROMPT[:3]], "b", stream=True, **params)
    bench.step(steps)
    bench.scheduler.retract()
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (0, 2)
    bench.finish()
    for mine, theirs in zip(sequences, expected, strict=True):
        assert bench.result(mine)[0] == bench.result(theirs)[0]
        assert bench.result(mine)[1] == pytest.approx(bench.result(theirs)[1], abs=1e-4)


def test_retraction_in_the_middle_of_a_prompt_does_not_double_its_logprobs(model: Path) -> None:
    bench = Bench(model)
    sequences = bench.add([PROMPT], max_new_tokens=2)
    sequences[0].logprob_start = 0
    bench.step(1)
    bench.scheduler.retract()
    bench.finish()
    expected = teacher_forced(load_reference(model), PROMPT[:1], PROMPT[1:])
    assert sequences[0].input_logprobs == pytest.approx(expected, abs=1e-4)


def test_spans_name_the_version_of_each_token(model: Path) -> None:
    bench = Bench(model, weight_version="v0", stream_interval=1)
    (mine,) = bench.add([[5]], max_new_tokens=9, ignore_eos=True, stream=True)
    bench.step(3)
    bench.scheduler.set_weight_version("v1")
    bench.scheduler.set_weight_version("v2")  # no token was drawn under v1
    bench.step(2)
    bench.scheduler.retract()
    bench.scheduler.set_weight_version("v3")
    bench.scheduler.set_weight_version("v2")  # back before the next token: one span
    bench.step(2)
    bench.scheduler.set_weight_version("v4")
    (late,) = bench.add([[6]], "late", max_new_tokens=1)
    bench.finish()
    spans = [delta.spans for delta in bench.deltas if delta.sequence is mine][-1]
    assert spans == [
        {"version": "v0", "start": 0, "end": 3},
        {"version": "v2", "start": 3, "end": 7},
        {"version": "v4", "start": 7, "end": 9},
    ]
    for delta in bench.deltas:
        assert delta.spans[-1]["end"] == delta.completion_tokens
        assert delta.weight_version == delta.spans[-1]["version"]
    assert [d.spans for d in bench.deltas if d.sequence is late] == [[{"version": "v4", "start": 0, "end": 1}]]


def test_a_decode_rate_spaces_decode_steps_and_nothing_else(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr("services.rollout.engines.torch_engine.scheduler.time.monotonic", lambda: clock)
    bench = Bench(model, decode_rate=4.0)
    (first,) = bench.add([PROMPT], max_new_tokens=3, ignore_eos=True)
    bench.step(3)  # three chunks of the prompt; the last one brings the first token
    assert (bench.scheduler.generated_tokens, bench.scheduler.idle_seconds()) == (1, 0.25)
    bench.step(2)
    assert bench.scheduler.generated_tokens == 1
    clock += 0.1
    bench.add([PROMPT], rid="s", max_new_tokens=3, ignore_eos=True)
    assert bench.scheduler.idle_seconds() == 0.0  # a prompt can be worked on
    bench.step(3)
    assert bench.scheduler.idle_seconds() == pytest.approx(0.15)
    for expected in (3, 5, 6):  # both requests take part in each decode step
        clock += bench.scheduler.idle_seconds()
        bench.step(1)
        assert bench.scheduler.generated_tokens == expected
    assert len(bench.result(first)[0]) == 3


def test_a_rate_is_no_reason_to_wait_for_a_request_without_a_slot(model: Path) -> None:
    bench = Bench(model, decode_rate=0.001, max_running_requests=1)
    bench.add([[5], [6]], max_new_tokens=2, ignore_eos=True)
    bench.step(1)
    assert bench.scheduler.num_waiting == 1
    assert bench.scheduler.idle_seconds() > 900


def test_completions_end_at_the_context(model: Path) -> None:
    bench = Bench(model, context_length=32)
    (mine,) = bench.add([PROMPT], max_new_tokens=1000, ignore_eos=True)
    bench.finish()
    assert len(bench.result(mine)[0]) == 32 - len(PROMPT)
    assert bench.deltas[-1].finish_reason == {"type": "length", "length": 32 - len(PROMPT)}


def test_a_slot_remembers_nothing_of_its_last_request(model: Path) -> None:
    bench = Bench(model, max_running_requests=1)
    bench.add([list(range(3, 90))], "long", max_new_tokens=5, ignore_eos=True, stop_token_ids=[5, 6, 7, 8, 9, 10])
    (mine,) = bench.add([[7, 9]], "mine", max_new_tokens=12, ignore_eos=True)
    bench.finish()
    tokens, logprobs = bench.result(mine)
    assert logprobs == pytest.approx(teacher_forced(load_reference(model), [7, 9], tokens), abs=1e-4)


def test_weights_that_are_not_finite_end_requests_with_an_error(model: Path) -> None:
    bench = Bench(model)
    bench._engine.parameters.norm.fill_(torch.nan)
    bench.add([[7]], max_new_tokens=5)
    bench.finish()
    reason = bench.deltas[-1].finish_reason
    assert reason is not None
    assert (reason["type"], reason["status_code"]) == ("abort", 500)


def test_aborting_while_waiting_delivers_what_there_is(model: Path) -> None:
    bench = Bench(model, stream_interval=2)
    (mine,) = bench.add([[5]], "mine", stream=True, max_new_tokens=20, ignore_eos=True)
    bench.step(5)
    bench.scheduler.retract()
    bench.scheduler.abort("mine_0", "enough")
    tokens, logprobs = bench.result(mine)
    assert len(tokens) == len(logprobs) == 5 == bench.deltas[-1].completion_tokens
    assert not bench.scheduler.has_work
