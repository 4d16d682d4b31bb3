"""The witness: asks engines and replicas all the time which weights they serve, and holds their answers against the
models'.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import aiohttp
import orjson
import psutil

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common import wire
from services.common.buffer_client import BufferClient
from services.common.errors import PolyheadError
from services.common.versions import Version
from tests.kit.pushes.models import PROMPT, SHORT, Models, Turn

# Between two questions to one engine, and between two prompts for the replicas.
ASK_EVERY_S = 0.02
SUBMIT_EVERY_S = 0.15
# An engine that is paused or frozen answers late, one that is gone not at all.
ANSWER_S = 60.0
_LOOK_S = 0.1
_UNKNOWN, _NONE = "default", Version(0, 0)


@dataclass(frozen=True)
class Answer:
    """One engine's, to a question of the witness."""

    replica: int
    engine: str
    """Its kind."""
    pid: int
    asked: float
    at: float
    """When it came, by the monotonic clock."""
    tokens: Sequence[int]
    version: str
    turns: Sequence[tuple[str, int, int]]
    """Versions by token, where the engine tells them."""


@dataclass
class Verdict:
    """What became of the answers."""

    counts: Counter[str] = field(default_factory=Counter)
    mixed: list[str] = field(default_factory=list)
    """Answers with a token that the weights of its version do not explain."""


class EngineCanary:
    """Asks the engine of one replica the same question, one after the other."""

    def __init__(self, replica: int, process: Callable[[], psutil.Process | None], prompt: Sequence[int]) -> None:
        self.replica = replica
        self.answers: list[Answer] = []
        self.every_s = ASK_EVERY_S
        self._process, self._prompt = process, prompt

    async def run(self) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_S)) as session:
            while True:
                engine = self.engine()
                if engine is None or not await self._ask(session, engine):
                    await asyncio.sleep(_LOOK_S)
                await asyncio.sleep(self.every_s)

    def engine(self) -> EngineAddress | None:
        """The process that is the engine at present."""
        replica = self._process()
        if replica is None:
            return None
        with suppress(psutil.Error, OSError):
            for child in replica.children():
                if (address := engine_address(child)) is not None:
                    return address
        return None

    def longest_gap(self, since: float, until: float) -> float:
        """Seconds between two answers, or between one and the end of the time."""
        times = [since, *(answer.at for answer in self.answers if since < answer.at < until), until]
        return max(after - before for before, after in itertools.pairwise(times))

    async def _ask(self, session: aiohttp.ClientSession, engine: EngineAddress) -> bool:
        # Its prefix cache must not answer with what other weights have computed.
        body = {
            "input_ids": list(self._prompt),
            "sampling_params": {"max_new_tokens": SHORT, "temperature": 0.0},
            "extra_key": uuid.uuid4().hex,
        }
        asked = time.monotonic()
        try:
            async with session.post(f"{engine.url}/generate", json=body, headers=engine.headers) as response:
                answer = orjson.loads(await response.read())
                if response.status != 200:
                    return False
        except (aiohttp.ClientError, TimeoutError, OSError, orjson.JSONDecodeError):
            return False
        meta = answer["meta_info"]
        if meta["finish_reason"]["type"] == "abort":
            return True
        turns = [(span["version"], span["start"], span["end"]) for span in meta.get("weight_versions") or []]
        self.answers.append(
            Answer(
                self.replica,
                engine.kind,
                engine.pid,
                asked,
                time.monotonic(),
                answer["output_ids"],
                meta.get("weight_version", _UNKNOWN),
                turns,
            )
        )
        return True


class Lag:
    """How late the witness itself is: what other processes on its cores, or it itself, take from everybody."""

    def __init__(self) -> None:
        self._late: list[tuple[float, float]] = []

    async def run(self) -> None:
        while True:
            due = time.monotonic() + ASK_EVERY_S
            await asyncio.sleep(ASK_EVERY_S)
            now = time.monotonic()
            self._late.append((now, now - due))

    def longest(self, since: float) -> float:
        return max((late for at, late in self._late if at > since), default=0.0)


@dataclass(frozen=True)
class EngineAddress:
    pid: int
    pids: Sequence[int]
    """All of its processes."""
    kind: str
    url: str
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


def engine_address(process: psutil.Process) -> EngineAddress | None:
    """None when it is no engine, or none yet."""
    command = process.cmdline()
    if "--port" not in command or not any("torch_engine" in part or "sglang" in part for part in command):
        return None
    environment = process.environ()
    arguments = environment.get("POLYHEAD_SECRET_ARGUMENTS", "").split()
    keys = [part.partition("=")[2] for part in arguments if part.startswith("--admin-api-key=")]
    key = keys[0] if keys else environment.get("POLYHEAD_ENGINE_ADMIN_KEY", "")
    pids = [process.pid, *(child.pid for child in process.children(recursive=True))]
    kind = "torch" if any("torch_engine" in part for part in command) else "sglang"
    return EngineAddress(process.pid, pids, kind, f"http://127.0.0.1:{command[command.index('--port') + 1]}", key)


class Flow:
    """Has the replicas generate the same answer, through the buffer, and gives each one a reward: batches to train."""

    def __init__(self, buffer: BufferClient) -> None:
        self.samples: list[sample_pb2.Sample] = []
        self.submitted = 0
        self._buffer = buffer

    async def run(self) -> None:
        await asyncio.gather(self._submit(), self._score())

    async def _submit(self) -> None:
        while True:
            prompt = sample_pb2.Prompt(text=PROMPT, label="1")
            await self._buffer.submit(f"canary-{self.submitted}", [prompt])
            self.submitted += 1
            await asyncio.sleep(SUBMIT_EVERY_S)

    async def _score(self) -> None:
        while True:
            with suppress(PolyheadError):
                lease = await self._buffer.lease(sample_pb2.STAGE_SCORE, "witness", max_samples=64, wait_s=1.0)
                leased = [each for group in lease.groups for each in group.samples]
                self.samples += [sample_pb2.Sample.FromString(each.sample) for each in leased]
                score = sample_pb2.Score(reward=1.0, scorer="witness")
                done = [
                    pb.CompletedSample(sample_id=each.sample_id, lease_id=each.lease_id, score=score) for each in leased
                ]
                if done:
                    await self._buffer.complete(sample_pb2.STAGE_SCORE, "witness", done)


class Judge:
    """Knows which model each version was made of."""

    def __init__(self, models: Models) -> None:
        self.verdict = Verdict()
        self._models = models
        self._of = {_UNKNOWN: 0}
        """Engines start with the first model's weights, which are no version."""
        self._newest: dict[int, Version] = {}
        """What each engine has answered by: a superseded trainer's push may not come after a later one."""

    def learn(self, version: str, model: int) -> None:
        self._of[version] = model

    def engine_answers(self, answers: Sequence[Answer]) -> None:
        """Of one engine's place, in order."""
        for answer in answers:
            self._count("engine", self._engine_answer(answer), str(answer))
            known, now = self._newest.get(answer.pid, _NONE), _parsed(answer.version)
            if now < known:
                self.verdict.mixed.append(f"older than {known}, which the engine had said before: {answer}")
            self._newest[answer.pid] = max(known, now)

    def samples(self, samples: Sequence[sample_pb2.Sample]) -> None:
        for sample in samples:
            segment = sample.segments[0]
            tokens = wire.decode_tokens(segment.token_ids).tolist()[segment.prompt_length :]
            turns = [(str(Version.from_proto(span.version)), span.start, span.end) for span in segment.spans]
            what = f"{sample.sample_id} {sample.engine} {tokens} {turns}"
            kind = self._spans(tokens, turns)
            if kind == "mixed" and sample.engine.startswith("sglang") and self._a_token_early(tokens, turns):
                kind = "stamped a token older"
            self._count("replica", kind, what)

    def _count(self, whose: str, kind: str, what: str) -> None:
        self.verdict.counts[f"{whose} {kind}"] += 1
        if kind == "mixed":
            self.verdict.mixed.append(what)

    def _engine_answer(self, answer: Answer) -> str:
        if answer.turns and (kind := self._spans(answer.tokens, answer.turns)) != "mixed":
            return kind
        # SGLang may have drawn the first token that it says is of a version by the one before: it decodes one pass
        # ahead. Its replica puts that right; here it is enough that there is a token at which the versions changed.
        if answer.engine != "sglang" or answer.version not in self._of:
            return "mixed"
        new = self._of[answer.version]
        if self._models.whole(answer.tokens, new):
            return "whole"
        others = set(self._of.values()) - {new}
        return "spanning" if any(self._models.turned_once(answer.tokens, old, new) for old in others) else "mixed"

    def _a_token_early(self, tokens: Sequence[int], turns: Sequence[tuple[str, int, int]]) -> bool:
        """Whether versions came one token earlier than stamped, at the end perhaps one that no token is stamped by.

        A replica counts on the pass that ran when SGLang was paused to have been a decode of all that ran. It sees to
        that for its own requests; what the witness asks the engine itself, it knows nothing of.
        """
        models, end = [self._of[version] for version, _, _ in turns], len(tokens)
        for early in itertools.product((0, 1), repeat=len(turns) - 1):
            starts = [0, *(start - shift for (_, start, _), shift in zip(turns[1:], early, strict=True))]
            for last in {*self._of.values()}:
                # The last token by the last of the models, or by one after it.
                spans = [*zip(models, starts, [*starts[1:], end - 1], strict=True), (last, end - 1, end)]
                if self._models.explained(tokens, [Turn(*span) for span in spans]):
                    return True
        return False

    def _spans(self, tokens: Sequence[int], turns: Sequence[tuple[str, int, int]]) -> str:
        if any(version not in self._of for version, _, _ in turns):
            return "mixed"
        models = [Turn(self._of[version], start, end) for version, start, end in turns]
        if len({turn.model for turn in models}) == 1 and self._models.whole(tokens, models[0].model):
            return "whole"
        return "spanning" if self._models.explained(tokens, models) else "mixed"


def _parsed(version: str) -> Version:
    return _NONE if version == _UNKNOWN else Version.parse(version)


async def checksum(engine: EngineAddress) -> str:
    """Of all of the engine's weights, as it says itself."""
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.post(f"{engine.url}/weights_checker", json={"action": "checksum"}, headers=engine.headers) as response,
    ):
        answer = orjson.loads(await response.read())
        assert response.status == 200, answer
    return str(answer["per_engine_checksum"])
