"""The kit that strikes pushes: points are where they say, each combination is drawn, and torn weights are found out."""

from __future__ import annotations

import functools
import importlib
from itertools import islice

import pytest
import torch

from tests.kit.pushes import points
from tests.kit.pushes.models import SHORT, Models, Turn
from tests.kit.pushes.steps import SGLANG, SIGNALS, TORCH, VICTIMS, Draw, Fault


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    torch.set_num_threads(1)
    return Models(tmp_path_factory.mktemp("models"), 3)


@pytest.mark.parametrize("place", points.places())
def test_every_point_is_a_function_of_its_service(place: str) -> None:
    module, _, path = place.partition(":")
    assert callable(functools.reduce(getattr, path.split("."), importlib.import_module(module)))


def draw(kinds: tuple[str, ...], steps: tuple[str, ...], seed: int = 0) -> Draw:
    return Draw(seed, len(kinds), kinds, steps)


@pytest.mark.parametrize(("kinds", "steps"), [(("torch", "torch"), TORCH), (("sglang", "torch"), SGLANG)])
def test_each_combination_is_struck_before_any_is_struck_twice(kinds: tuple[str, ...], steps: tuple[str, ...]) -> None:
    whole = {f"{step} / {victim} / {how}" for step in steps for victim in VICTIMS for how in SIGNALS}
    faults = list(islice(draw(kinds, steps).faults(), len(whole)))
    assert {fault.combination for fault in faults} == whole
    assert faults == list(islice(draw(kinds, steps).faults(), len(whole)))


def test_a_few_faults_hold_each_victim_and_signal_and_every_step() -> None:
    faults = draw(("torch", "torch"), TORCH, seed=3).few(10)
    assert {(fault.victim, fault.signal) for fault in faults} == {(who, how) for who in VICTIMS for how in SIGNALS}
    assert {fault.step for fault in faults} == set(TORCH)


def test_a_point_belongs_to_a_process_that_comes_to_it() -> None:
    for fault in islice(draw(("torch", "torch"), TORCH).faults(), 200):
        assert fault.point.startswith({"replica": "rollout."}.get(fault.at, f"{fault.at}."))
        assert fault.at == fault.victim or fault.at == "replica"


def test_a_fault_reads_as_what_it_is() -> None:
    fault = Fault("begin", "engine", "freeze", 1, "engine", "engine.pause.before", long=True)
    assert str(fault) == "freeze long engine of rollout-1's push at engine.pause.before"


def test_an_answer_names_its_model(models: Models) -> None:
    for model, answer in enumerate(models.answers):
        assert [models.whole(answer[:SHORT], other) for other in range(3)] == [other == model for other in range(3)]


def test_an_answer_that_spans_a_push_is_explained_by_its_turns_alone(models: Models) -> None:
    first = models.answers[1][:3]
    carried = models.continued(first, old=1, new=2, length=SHORT)
    assert models.explained(carried, [Turn(1, 0, 3), Turn(2, 3, SHORT)])
    assert models.turned_once(carried, 1, 2)
    assert not models.explained(carried, [Turn(1, 0, SHORT)])
    assert not models.explained(carried, [Turn(2, 0, SHORT)])


def test_a_resumed_answer_is_explained_by_a_cache_of_its_own(models: Models) -> None:
    first = models.answers[1][:3]
    resumed = models.continued(first, old=None, new=2, length=SHORT)
    assert models.explained(resumed, [Turn(1, 0, 3), Turn(2, 3, SHORT)])


@pytest.mark.parametrize("part", [0, 1])
def test_half_of_a_push_is_no_model(models: Models, part: int) -> None:
    """With the tensors of either bucket from another version."""
    names = models.names()
    half = names[: len(names) // 2] if part else names[len(names) // 2 :]
    torn = models.torn(1, 2, half)
    assert not any(models.whole(torn, model) for model in range(3))
    assert not models.turned_once(torn, 1, 2)
