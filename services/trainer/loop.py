"""The training loop. It runs on a thread of its own; what talks to others happens on the asyncio loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import structlog

from polyhead.v1 import buffer_pb2 as pb
from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.errors import InvalidArgumentError, TrainingDivergedError, UnavailableError
from services.common.versions import Version
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.backends.torch.results import StepResult
from services.trainer.batch.lease import lease_batch
from services.trainer.batch.samples import TrainSample, decode_groups
from services.trainer.batch.staleness import Clock
from services.trainer.io_thread import Io
from services.trainer.metrics import Times, batch_metrics, sample_line, step_line, training_metrics
from services.trainer.overlap import TrainIntervals
from services.trainer.records import JsonLines
from services.trainer.saver import Saver
from services.trainer.status import TrainerStatus
from services.trainer.step import mask_above, train_batch
from services.trainer.weights.publisher import Publisher

log = structlog.get_logger()

LEASE_WAIT_S = 2.0
# The next attempt does not come sooner after one that brought nothing.
PAUSE_S = 0.25
# Steps in a row that trained nothing before the run ends.
MAX_SKIPPED = 3
# Under pressure of the store a checkpoint is made at most every so many steps.
RELIEVE_EVERY = 5
# What the buffer says it waits for when its memory is used up.
STORE_MEMORY = "store memory"
SAMPLES_RECORDED = 2
# Of `mismatch_kl_fresh`: far beyond what rounding explains, in fp8 too.
DISAGREE_KL = 0.2
# How long the last version is pushed before the run ends without it.
LAST_PUSH_S = 5.0


@dataclass(frozen=True)
class Services:
    """What the loop works with."""

    io: Io
    buffer: BufferClient
    backend: TorchBackend
    publisher: Publisher
    saver: Saver
    status: TrainerStatus
    metrics: JsonLines
    samples: JsonLines


class Loop:
    """One epoch of training: lease, train, commit, publish, save."""

    def __init__(self, config: Config, services: Services, *, holder: str, epoch: int, forks: dict[int, int]) -> None:
        """`holder` is the replica id under which batches are leased."""
        self._config = config
        self._s = services
        self._holder = holder
        self._epoch = epoch
        self._forks = forks
        self._intervals = TrainIntervals()
        self._skipped = 0
        self._relieved_at = 0

    def run(self, step: int) -> int:
        """Trains on from committed `step` until all steps are done or a stop is requested, and saves.

        Returns the last committed step. Raises FencedError when another trainer has taken over, and
        TrainingDivergedError after three steps in a row that were not finite.
        """
        status, total = self._s.status, self._config.run.num_rollout
        version = status.version = Version(self._epoch, step)
        self._publish(version)
        with status.waiting("publishing"):
            status.waiting_for = pb.WaitingFor(reason="a rollout replica to take the weights")
            self._await_published(version)
        while step < total and not self._s.io.should_stop():
            times, started = Times(), time.monotonic()
            lease = self._lease(step + 1, times)
            if lease is None:
                break
            step += 1
            checkpoint_wanted = self._train(step, lease, times, started)
            if checkpoint_wanted and step >= self._relieved_at + RELIEVE_EVERY:
                with status.busy("saving"):
                    self._relieve(step)
            elif step % self._config.trainer.checkpoint.save_interval == 0:
                self._save(step)
        self._save(step)
        with status.busy("saving"):
            self._s.saver.finish()
        if step >= total:
            self._s.io.call_or_stop(self._last_push(Version(self._epoch, step)))
        return step

    def _lease(self, step: int, times: Times) -> pb.LeaseResponse | None:
        """The batch of `step`, however long it takes; None when a stop is requested first.

        Raises what the buffer refuses for good.
        """
        quiet_since = time.monotonic()
        with self._s.status.waiting("waiting"), _timed(times, "wait_s"):
            while not self._s.io.should_stop():
                asked = time.monotonic()
                response = self._try_lease(step)
                if response is None or response.groups:
                    return response
                waiting_for = self._s.status.waiting_for = response.waiting_for
                if waiting_for.reason == STORE_MEMORY:
                    self._relieve(step - 1)
                self._attend(Version(self._epoch, step - 1))
                if time.monotonic() - quiet_since > self._config.run.stall_limit_s:
                    quiet_since = time.monotonic()
                    log.warning("stalled", step=step, waiting_for=waiting_for.reason)
                self._pause(asked)
        return None

    def _try_lease(self, step: int) -> pb.LeaseResponse | None:
        """One poll; None when a stop is requested meanwhile. A buffer that is away is waited for like samples."""
        limits = self._config.buffer.limits
        lease = lease_batch(
            self._s.buffer, self._holder, epoch=self._epoch, step=step, wait_s=LEASE_WAIT_S, limits=limits
        )
        try:
            return self._s.io.call_or_stop(lease)
        except UnavailableError as error:
            log.warning("lease_waits", step=step, reason=str(error))
            return pb.LeaseResponse(waiting_for=pb.WaitingFor(reason="the buffer"))

    def _pause(self, since: float) -> None:
        self._s.io.call_or_stop(asyncio.sleep(since + PAUSE_S - time.monotonic()))

    def _train(self, step: int, lease: pb.LeaseResponse, times: Times, started: float) -> bool:
        """Everything from a leased batch to a published version. Returns whether the buffer wants a checkpoint."""
        status = self._s.status
        clock = Clock(Version(self._epoch, step - 1), self._forks)
        with status.busy("training"), _timed(times, "train_s"), self._interval():
            samples, results = self._train_batch(lease.groups, clock)
        trained = any(result.applied for result in results)
        with status.waiting("committing"), _timed(times, "commit_s"):
            checkpoint_wanted = self._commit(step, lease.batch_lease_id, trained)
        version = Version(self._epoch, step)
        if step % self._config.staleness.publish_interval == 0 or step == self._config.run.num_rollout:
            with status.waiting("publishing"), _timed(times, "publish_wait_s"):
                self._publish(version)
        times.step_s = time.monotonic() - started
        self._record(version, clock, lease.groups, samples, results, times)
        self._skipped = 0 if trained else self._skipped + 1
        if self._skipped == MAX_SKIPPED:
            raise TrainingDivergedError(f"{MAX_SKIPPED} steps in a row trained nothing, the last is step {step}")
        return checkpoint_wanted

    def _train_batch(
        self, groups: Sequence[pb.LeasedGroup], clock: Clock
    ) -> tuple[list[TrainSample], list[StepResult]]:
        try:
            backend = self._s.backend
            samples = decode_groups(groups, vocab_size=backend.vocab_size, context_length=backend.context_length)
        except InvalidArgumentError as error:
            log.warning("batch_unusable", sample_id=error.field, reason=error.reason)
            return [], []
        return samples, train_batch(self._s.backend, samples, clock, self._config)

    def _commit(self, step: int, batch_lease_id: int, trained: bool) -> bool:
        """Returns when the buffer has the step: whether it wants a checkpoint. A refusal is raised: it is the end."""
        outcome = pb.STEP_OUTCOME_TRAINED if trained else pb.STEP_OUTCOME_SKIPPED
        while True:
            asked = time.monotonic()
            try:
                commit = self._s.buffer.commit_step(self._epoch, step, batch_lease_id, outcome)
                return self._s.io.call(commit).checkpoint_wanted
            except UnavailableError as error:
                if self._s.io.should_stop():
                    raise
                log.warning("commit_waits", step=step, reason=str(error))
                self._pause(asked)

    def _publish(self, version: Version) -> None:
        """Copies the weights, once the last version has been pushed, and leaves the push to the publisher."""
        backend = self._s.backend
        snapshot = self._s.io.call_or_stop(self._s.publisher.take_snapshot(backend.layout))
        if snapshot is not None:
            snapshot.fill(backend.tensors())
            self._s.io.call(self._s.publisher.offer(version, snapshot))

    def _await_published(self, version: Version) -> None:
        self._s.io.call_or_stop(self._s.publisher.wait_published(version))

    def _attend(self, version: Version) -> None:
        """Between two polls for a batch, while `version` is published: the publisher sees to all by itself."""

    def _record(
        self,
        version: Version,
        clock: Clock,
        groups: Sequence[pb.LeasedGroup],
        samples: Sequence[TrainSample],
        results: Sequence[StepResult],
        times: Times,
    ) -> None:
        batch = batch_metrics(groups, samples, clock, mask_above(self._config))
        overlap = self._intervals.overlap_tokens(samples)
        training = training_metrics(results)
        if (training["mismatch_kl_fresh"] or 0.0) > DISAGREE_KL:
            reason = "with the same weights the engines compute something else than the trainer"
            log.warning("engines_disagree", step=version.step, kl=training["mismatch_kl_fresh"], reason=reason)
        line = step_line(version.step, version, batch, training, overlap, times)
        self._s.metrics.write(line)
        for sample in samples[:: max(len(samples) // SAMPLES_RECORDED, 1)][:SAMPLES_RECORDED]:
            self._s.samples.write(sample_line(version.step, sample, clock))
        self._s.status.report(version, line)

    def _save(self, step: int) -> None:
        with self._s.status.busy("saving"):
            self._s.saver.save(self._s.backend, Version(self._epoch, step))

    def _relieve(self, step: int) -> None:
        """Lets the buffer retire all that the steps so far consumed."""
        self._relieved_at = step
        self._s.saver.relieve(self._s.backend, Version(self._epoch, step))

    async def _last_push(self, version: Version) -> None:
        try:
            async with asyncio.timeout(LAST_PUSH_S):
                await self._s.publisher.wait_published(version)
        except TimeoutError:
            log.info("last_version_not_published", version=str(version))

    @contextmanager
    def _interval(self) -> Iterator[None]:
        """Remembers the time inside as spent training."""
        started = time.time_ns()
        try:
            yield
        finally:
            self._intervals.add(started // 1000, time.time_ns() // 1000)


@contextmanager
def _timed(times: Times, name: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        setattr(times, name, getattr(times, name) + time.monotonic() - started)
