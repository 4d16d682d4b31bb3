"""I9: with `run.deterministic` the services are the plain synchronous loop, bit for bit, whatever happens when."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common import wire
from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.trainer import loop
from services.trainer.backends.torch.optimizer import Optimizer
from tests.kit import late_functions, valkey
from tests.kit.in_process import Services
from tests.kit.plain_loop import Completion, Step, plain_loop
from tests.kit.tiny_model import build_tiny_qwen3_moe

STEPS = 6
Leased = dict[int, Sequence[pb.LeasedGroup]]


@pytest.fixture(autouse=True)
def as_before() -> Any:
    """What a trainer sets for its process is set back."""
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def configured(inputs: Path, run_dir: Path, store_url: str, **batch: Any) -> Config:
    """3 groups of 3 a step, fewer slots than samples, up to 16 tokens each."""
    return Config(
        run={"dir": run_dir, "num_rollout": STEPS, "deterministic": True, "seed": 3},
        model={"hf_checkpoint": inputs / "model"},
        data={"prompt_data": str(inputs / "prompts.jsonl"), "input_key": "prompt", "label_key": "label"},
        batch={"rollout_batch_size": 3, "n_samples_per_prompt": 3, **batch},
        staleness={"max_staleness": 0},
        store={"url": store_url},
        buffer={"lease_ttl_s": 2.0, "replica_ttl_s": 3.0, "max_attempts": 50},
        rollout={
            "save_interval_s": 0.1,
            "sampling": {"max_response_len": 16},
            "engine": {
                "max_running_requests": 8,
                "context_length": 32,
                "prefill_chunk": 4,
                "stream_interval": 2,
                "decode_rate": 80.0,
            },
        },
        reward={"scorer": "tests.kit.late_functions:reward", "processes": 2},
        trainer={
            "optimizer": {"lr": 3e-3, "warmup_steps": 3, "weight_decay": 0.1},
            "checkpoint": {"save_interval": 2, "keep_last": STEPS, "export_hf": False},
            "weights": {"bucket_mb": 1},
        },
    )


class CrashError(Exception):
    """Of a trainer."""


async def engine_frozen_and_killed(services: Services, _: pytest.MonkeyPatch) -> None:
    """At moments that depend on how fast the machine is."""
    await in_generation(services, 1)
    await services.freeze_engine(0.5)
    await in_generation(services, 2)
    await services.kill_engine()


async def rollout_replaced(services: Services, _: pytest.MonkeyPatch) -> None:
    """All that it held comes back when its leases are over."""
    await in_generation(services, 1)
    await services.replace("rollout")


async def trainer_crashes(_: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """In step 4, two steps after its checkpoint: of what is undone, one step is replayed and one generated anew. And
    again between a step and its push.
    """
    step, publish = Optimizer.step, BufferClient.publish_version
    seen = {"step": 0, "publish": 0}

    def counted(name: str, at: int) -> None:
        seen[name] += 1
        if seen[name] == at:
            raise CrashError(name)

    def crashing_step(self: Optimizer) -> None:
        step(self)
        counted("step", 4)

    async def crashing_publish(self: BufferClient, *arguments: Any, **named: Any) -> Any:
        counted("publish", 8)
        return await publish(self, *arguments, **named)

    monkeypatch.setattr(Optimizer, "step", crashing_step)
    monkeypatch.setattr(BufferClient, "publish_version", crashing_publish)


async def in_generation(services: Services, step: int) -> None:
    """In the middle of it, after that step or a later one."""
    generating = sample_pb2.SAMPLE_STATE_GENERATING
    await services.until(lambda now: now.step >= step and any(each.state == generating for each in now.counts))
    await asyncio.sleep(0.1)


def varied(_texts: Sequence[str], rewards: Sequence[float]) -> bool:
    return len(set(rewards)) > 1


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("batch", "keeps", "late_s", "disturb", "experts"),
    [
        pytest.param({}, lambda texts, rewards: True, 0.3, engine_frozen_and_killed, False, id="grpo"),
        pytest.param(
            {"over_sampling_batch_size": 6, "dynamic_sampling_filter": "nonzero_std"},
            varied,
            0.5,
            rollout_replaced,
            False,
            id="over-sampling",
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"over_sampling_batch_size": 5, "dynamic_sampling_filter": "tests.kit.late_functions:keep"},
            lambda texts, rewards: late_functions.keeps(texts),
            0.5,
            trainer_crashes,
            False,
            id="users-filter",
        ),
        pytest.param(
            {}, lambda texts, rewards: True, 0.3, engine_frozen_and_killed, True, id="experts", marks=pytest.mark.long
        ),
    ],
)
async def test_the_services_are_the_plain_loop_bit_for_bit(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch: dict[str, Any],
    keeps: Callable[[Sequence[str], Sequence[float]], bool],
    late_s: float,
    disturb: Callable[[Services, pytest.MonkeyPatch], Awaitable[None]],
    experts: bool,
) -> None:
    monkeypatch.setenv(late_functions.LATE_S, str(late_s))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    leased: Leased = {}
    monkeypatch.setattr(loop, "lease_batch", spy(loop.lease_batch, leased))
    with valkey.running(appendfsync="always") as store:
        config = configured(inputs, tmp_path / "run", store.url, **batch)
        if experts:
            config.model.hf_checkpoint = build_tiny_qwen3_moe(tmp_path / "model")
        async with Services(config) as services:
            disturbing = asyncio.create_task(disturb(services, monkeypatch))
            assert await trained(services) == (2 if disturb is trainer_crashes else 0)
            await disturbing
            closed = {each.drop_reason: each.samples for each in (await services.client.get_ledger()).counts}
    if batch:
        assert closed.keys() & {sample_pb2.DROP_REASON_ZERO_VARIANCE, sample_pb2.DROP_REASON_FILTERED}
        assert sample_pb2.DROP_REASON_SURPLUS in closed, "what was begun ahead has been begun again"
    plain = await asyncio.to_thread(lambda: list(plain_loop(config, late_functions.reward_of, keeps)))
    for number, wanted in enumerate(plain, start=1):
        check_equal(number, wanted, recorded(config, leased[number], number))


async def trained(services: Services) -> int:
    """A trainer that has crashed is started again, as a launcher does. Returns how often one did."""
    for crashes in itertools.count():
        try:
            assert await services.tasks["trainer"] == 0
        except CrashError:
            services.start("trainer")
        else:
            return crashes
    raise AssertionError


def spy(lease_batch: Callable[..., Awaitable[pb.LeaseResponse]], leased: Leased) -> Callable[..., Awaitable[Any]]:
    """Notes what the trainer gets."""

    async def call(*arguments: Any, step: int, **named: Any) -> pb.LeaseResponse:
        response = await lease_batch(*arguments, step=step, **named)
        if response.groups:
            leased[step] = response.groups
        return response

    return call


def recorded(config: Config, groups: Sequence[pb.LeasedGroup], step: int) -> Step:
    """What the services have left of a step: its batch, its line, its checkpoint."""
    lines = [json.loads(line) for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()]
    line = [line for line in lines if line["step"] == step][-1]
    directory = config.run.dir / "checkpoints" / f"step_{step:08d}"
    saved = ("model", "optimizer", "rng") if directory.exists() else ()
    return Step(
        [group.prompt_ordinal for group in groups],
        [[_completion(sample) for sample in group.samples] for group in groups],
        line["loss"],
        line["grad_norm"],
        {part: load_file(directory / f"{part}-00000.safetensors") for part in saved},
    )


def _completion(leased: pb.LeasedSample) -> Completion:
    (segment,) = sample_pb2.Sample.FromString(leased.sample).segments
    tokens = wire.decode_tokens(segment.token_ids)[segment.prompt_length :]
    return Completion(tokens.tolist(), wire.decode_logprobs(segment.rollout_logprobs).tolist())


def check_equal(number: int, wanted: Step, found: Step) -> None:
    assert found.ordinals == wanted.ordinals, f"step {number}"
    assert found.completions == wanted.completions, f"step {number}"
    assert (found.loss, found.grad_norm) == (wanted.loss, wanted.grad_norm), f"step {number}"
    assert found.state or number < STEPS
    for part, tensors in found.state.items():
        assert tensors.keys() == wanted.state[part].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, wanted.state[part][name]), f"step {number}: {part} {name}"
