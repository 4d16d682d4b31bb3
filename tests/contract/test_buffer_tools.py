"""`polyhead buffer` against a real buffer process's service on a real Valkey."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.cli.main import main
from services.common.buffer_client import BufferClient
from services.common.config import Config, dump, load
from services.common.errors import InvalidArgumentError, LimitError, PreconditionError
from services.common.versions import Version
from tests.kit import valkey
from tests.kit.buffer_face import completed, scored, serving

GENERATE, SCORE = sample_pb2.STAGE_GENERATE, sample_pb2.STAGE_SCORE
FIRST = Version(1, 0)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(f'{{"input": "prompt {n}"}}\n' for n in range(10)))
    return load(
        None,
        {
            "run.name": tmp_path.name[-40:],
            "data.prompt_data": str(data),
            "batch.rollout_batch_size": 2,
            "batch.n_samples_per_prompt": 2,
            "staleness.max_staleness": 1,
            "buffer.limits.samples_per_rpc": 256,
        },
    )


@pytest.fixture
async def address(server: valkey.Valkey, config: Config, tmp_path: Path) -> AsyncIterator[str]:
    async with serving(server.url, config) as listening, BufferClient(listening, retry_for_s=2) as client:
        resolved = config.model_copy(deep=True)
        resolved.buffer.address = listening
        (tmp_path / "config.toml").write_text(dump(resolved))
        epoch = (await client.acquire_epoch("t")).epoch
        await client.recover(epoch, 0)
        await client.publish_version(Version(epoch, 0))
        yield listening


@pytest.fixture
async def client(address: str) -> AsyncIterator[BufferClient]:
    async with BufferClient(address, retry_for_s=2) as connected:
        yield connected


async def tool(*words: object) -> int:
    """The command's exit status. The service runs in this loop, the command in one of its own."""
    return await asyncio.to_thread(main, ["buffer", *(str(word) for word in words)])


async def make_ready(client: BufferClient, groups: int = 2) -> None:
    leased = await client.lease(GENERATE, "r", max_samples=2 * groups, weight_version=FIRST)
    await client.complete(GENERATE, "r", completed(leased))
    leased = await client.lease(SCORE, "s", max_samples=2 * groups)
    await client.complete(SCORE, "s", scored(leased))


async def kill_one(client: BufferClient, error: str) -> str:
    leased = await client.lease(GENERATE, "r", max_samples=1, weight_version=FIRST)
    (sample,) = leased.groups[0].samples
    fatal = pb.ReleasedSample(
        sample_id=sample.sample_id, lease_id=sample.lease_id, reason=pb.RELEASE_REASON_FATAL, error=error
    )
    await client.release(GENERATE, "r", [fatal])
    return sample.sample_id


async def test_ledger_and_peek(client: BufferClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await make_ready(client)
    assert await tool("ledger", "--run", tmp_path) == 0
    out = capsys.readouterr().out
    assert "imbalance 0" in out
    assert [line.split() for line in out.splitlines() if line.strip().startswith("ready")] == [["ready", "4", "12"]]
    assert await tool("peek", "ready", "--run", tmp_path, "--limit", 1, "--chars", 3) == 0
    head, spans, prompt, completion = capsys.readouterr().out.splitlines()
    assert head.startswith("g00000000-000 of g00000000: attempt 0, 3 completion tokens, 5 in all, stop, reward ")
    assert (spans.strip(), prompt.strip()) == ("spans e1.s0[0:3]", "prompt 'pro' ... 8 characters")
    assert completion.strip() == "completion 'thr' ... 5 characters"


async def test_dead_letters_are_read_and_requeued(
    client: BufferClient, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dead = await kill_one(client, "too [long]")
    assert await tool("dead", "--address", address) == 0
    line = capsys.readouterr().out
    assert dead in line
    assert "requeue: reissued  too [long]" in line
    assert await tool("requeue", "--all", "--address", address) == 0
    assert "reissued 1" in capsys.readouterr().out
    assert await tool("requeue", "--all", "--address", address) == 0
    assert "nothing to requeue" in capsys.readouterr().out
    assert await tool("requeue", "--ids", dead, "g00000099-000", "--address", address) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "duplicate 1, gone 1"


@pytest.mark.parametrize("suffix", ["jsonl", "pb"])
async def test_what_is_exported_can_be_imported(
    client: BufferClient, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    await make_ready(client)
    file = tmp_path / f"ready.{suffix}"
    assert await tool("export", "ready", file, "--address", address) == 0
    assert "4 samples, 2 groups" in capsys.readouterr().out
    for _ in range(2):
        assert await tool("import", file, "--address", address) == 0
    ledger = await client.get_ledger()
    assert {row.state: row.samples for row in ledger.counts}[sample_pb2.SAMPLE_STATE_READY] == 8
    assert ledger.imbalance == 0
    before, after = [(await client.fetch([f"g{order:08d}-001"])).samples[0] for order in (0, ledger.accepted // 2 - 1)]
    old, new = (sample_pb2.Sample.FromString(each.sample) for each in (before, after))
    assert new.sample_id == after.sample_id != old.sample_id
    assert (new.segments[0], new.index, after.score.reward) == (old.segments[0], 1, before.score.reward)


async def test_prompts_of_dead_groups_are_submitted_again(
    client: BufferClient, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await kill_one(client, "x")
    file = tmp_path / "dead.jsonl"
    assert await tool("export", "dead", file, "--address", address) == 0
    assert await tool("import", file, "--address", address) == 0
    assert "0 groups, 1 prompts" in capsys.readouterr().out
    assert '"prompt 0"' in file.read_text()


async def test_a_broken_file_is_refused_by_its_place(
    client: BufferClient, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await make_ready(client)
    file = tmp_path / "a.jsonl"
    await tool("export", "ready", file, "--address", address)
    file.write_text(file.read_text().splitlines()[0] + '\n{"samples": [{}]}\n{"nothing": 1}\n')
    assert await tool("import", file, "--address", address) == 2
    error = capsys.readouterr().err
    assert "a.jsonl:2: groups[0].samples: 1, but a group of this run has 2 (after 1 groups and 0 prompts)" in error
    assert len(error.splitlines()) == 1
    (tmp_path / "b.pb").write_bytes(b"\xff\xff\xff")
    assert await tool("import", tmp_path / "b.pb", "--address", address) == 2
    assert "b.pb record 1: is not a group" in capsys.readouterr().err
    assert await tool("export", "ready", tmp_path / "c.csv", "--address", address) == 2


async def test_refusals_name_the_field(client: BufferClient) -> None:
    two = [pb.GroupSample()] * 2
    for call, kind, field in [
        (client.list_samples(sample_pb2.SAMPLE_STATE_RETIRED, 1), InvalidArgumentError, "state"),
        (client.list_samples(sample_pb2.SAMPLE_STATE_READY, 0), InvalidArgumentError, "limit"),
        (client.list_samples(sample_pb2.SAMPLE_STATE_READY, 257), InvalidArgumentError, "limit"),
        (client.list_samples(sample_pb2.SAMPLE_STATE_READY, 1, "x"), InvalidArgumentError, "page_token"),
        (client.requeue(["g1"]), InvalidArgumentError, "sample_ids[0]"),
        (client.requeue(["g00000001-000"] * 257), LimitError, "sample_ids"),
        (client.import_groups("", [pb.SampleGroup()]), InvalidArgumentError, "request_id"),
        (client.import_groups("a", []), InvalidArgumentError, "groups"),
        (client.import_groups("a", [pb.SampleGroup()] * 129), LimitError, "groups"),
        (client.import_groups("a", [pb.SampleGroup()]), InvalidArgumentError, "groups[0].samples"),
        (
            client.import_groups("a", [pb.SampleGroup(samples=two)]),
            InvalidArgumentError,
            "groups[0].prompt.input",
        ),
    ]:
        with pytest.raises(kind) as refused:
            await call
        assert refused.value.field == field


async def test_imported_samples_are_checked_like_completed_ones(client: BufferClient) -> None:
    prompt = sample_pb2.Prompt(text="p")
    empty = pb.SampleGroup(prompt=prompt, samples=[pb.GroupSample()] * 2)
    with pytest.raises(InvalidArgumentError) as refused:
        await client.import_groups("a", [empty])
    assert refused.value.field == "groups[0].samples[0].sample.segments"
    leased = await client.lease(GENERATE, "r", max_samples=2, weight_version=FIRST)
    samples = [
        pb.GroupSample(sample=sample_pb2.Sample.FromString(each.sample), score=sample_pb2.Score(reward=float("nan")))
        for each in completed(leased)
    ]
    with pytest.raises(InvalidArgumentError) as refused:
        await client.import_groups("a", [pb.SampleGroup(prompt=prompt, samples=samples)])
    assert refused.value.field == "groups[0].samples[0].score.reward"
    for sample in samples:
        sample.ClearField("score")
        sample.sample.segments[0].spans[0].version.epoch = 7
    with pytest.raises(PreconditionError, match="is no version of this run's history"):
        await client.import_groups("a", [pb.SampleGroup(prompt=prompt, samples=samples)])


async def test_the_documented_commands_run(
    client: BufferClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parents[2] / "docs" / "buffer.md"
    commands = [
        shlex.split(line, comments=True)[2:]
        for line in page.read_text().splitlines()
        if line.startswith("polyhead buffer ")
    ]
    assert [command[0] for command in commands] == ["ledger", "peek", "dead", "requeue", "export", "import"]
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "config.toml").rename(tmp_path / "runs" / "run" / "config.toml")
    monkeypatch.chdir(tmp_path)
    await kill_one(client, "x")
    await make_ready(client)
    for command in commands:
        assert await tool(*command) == 0, (command, capsys.readouterr())
