"""The same flow as rivals have it: through a Ray actor that holds a list, and through Ray's object store.

A rollout, a reward service and a trainer are Ray processes that overlap, with the batches and payloads of
`buffer_flow`. Nothing is leased, nothing is on disk, and what the actor held is gone with it.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from services.common.errors import ConfigError
from services.common.versions import Version
from tests.bench.buffer_flow import BATCH, MAX_STALENESS, STEP_SAMPLES, payload
from tests.bench.buffer_load import PAUSE_S, WARM_UP

_OBJECT_STORE_BYTES = 1 << 29
_LIVE = (MAX_STALENESS + 1) * STEP_SAMPLES


class _Mailboxes:
    """What an in-memory buffer does: lists. An item is a payload, or a reference to it in the object store."""

    def __init__(self) -> None:
        self._live = 0
        self._generated: deque[Any] = deque()
        self._scored: deque[Any] = deque()

    def room(self) -> int:
        return min(BATCH, _LIVE - self._live)

    def put(self, items: list[Any]) -> int:
        self._generated += items
        self._live += len(items)
        return self.room()

    def to_score(self) -> list[Any]:
        return [self._generated.popleft() for _ in range(min(BATCH, len(self._generated)))]

    def put_scored(self, items: list[Any], rewards: list[float]) -> None:
        self._scored += zip(items, rewards, strict=True)

    def to_train(self) -> list[Any]:
        if len(self._scored) < STEP_SAMPLES:
            return []
        self._live -= STEP_SAMPLES
        return [self._scored.popleft() for _ in range(STEP_SAMPLES)]


class _Role:
    """A client. `by_reference`: payloads travel through the object store, else inside the calls."""

    def __init__(self, mailboxes: Any, by_reference: bool) -> None:
        import ray

        self._ray, self._mailboxes, self._by_reference = ray, mailboxes, by_reference

    def _load(self, items: list[Any]) -> list[bytes]:
        return self._ray.get([each[0] for each in items]) if self._by_reference else items

    def generate(self) -> None:
        version, number = Version(1, 1), 0
        room = self._ray.get(self._mailboxes.room.remote())
        while True:
            if room < BATCH:
                time.sleep(PAUSE_S)
                room = self._ray.get(self._mailboxes.room.remote())
                continue
            items: list[Any] = []
            for index in range(BATCH):
                data = payload(f"g{number:08d}-{index:03d}", f"g{number:08d}", index, version)
                # A reference inside a list stays one: a bare argument would be fetched for the callee.
                items.append([self._ray.put(data)] if self._by_reference else data)
            number += 1
            room = self._ray.get(self._mailboxes.put.remote(items))

    def score(self) -> None:
        while True:
            items = self._ray.get(self._mailboxes.to_score.remote())
            if not items:
                time.sleep(PAUSE_S)
                continue
            rewards = [float(number % 2) for number, data in enumerate(self._load(items)) if data]
            self._ray.get(self._mailboxes.put_scored.remote(items, rewards))

    def train(self, steps: int) -> float:
        """Samples a second."""
        began = 0.0
        for step in range(WARM_UP + steps):
            if step == WARM_UP:
                began = time.monotonic()
            while not (batch := self._ray.get(self._mailboxes.to_train.remote())):
                time.sleep(PAUSE_S)
            assert all(self._load([item for item, _ in batch]))
        return steps * STEP_SAMPLES / (time.monotonic() - began)


def measure_ray(steps: int) -> dict[str, float]:
    """`ray_actor_samples_per_s`, `ray_store_samples_per_s`. Raises ConfigError when Ray is not installed."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            'Ray is not installed: "pip install polyhead[bench]", or --without-ray', field="ray"
        ) from error
    ray.init(
        num_cpus=4, include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, log_to_driver=False,
        configure_logging=False,
    )  # fmt: skip
    try:
        return {
            "ray_actor_samples_per_s": _samples_per_s(ray, steps, by_reference=False),
            "ray_store_samples_per_s": _samples_per_s(ray, steps, by_reference=True),
            "ray_version": ray.__version__,
        }
    finally:
        ray.shutdown()


def _samples_per_s(ray: Any, steps: int, *, by_reference: bool) -> int:
    role = ray.remote(num_cpus=1)(_Role)
    mailboxes = ray.remote(num_cpus=1)(_Mailboxes).remote()
    rollout, reward, trainer = (role.remote(mailboxes, by_reference) for _ in range(3))
    rollout.generate.remote()
    reward.score.remote()
    found = round(ray.get(trainer.train.remote(steps)))
    for actor in (rollout, reward, trainer, mailboxes):
        ray.kill(actor)
    return found
