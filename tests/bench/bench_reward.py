"""What the reward service itself costs: ``python tests/bench/bench_reward.py``.

`throughput` is the puller's whole path with a buffer in the same process, so without gRPC. `steps` sends what a step of
the demo sends, 64 samples in eights every 12 ms, through real gRPC and counts the CPU time of service and pool.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from polyhead.v1 import buffer_pb2 as pb
from services.common.config import Config, dump
from services.common.config.models import BufferConfig, RewardConfig
from services.reward.pool import ScorerPool
from services.reward.settings import ScorerSettings
from services.reward.stats import Stats
from services.reward.worker import Puller
from tests.kit.reward_fake_buffer import FakeBuffer, generated

COMPLETIONS = {"exact": "14", "math": "5+9=14, so \\boxed{14}"}


class LocalBuffer:
    """Answers leases from a list, at once."""

    def __init__(self, payloads: list[bytes]) -> None:
        self._payloads = payloads
        self._left = len(payloads)
        self._leased = 0
        self.done = asyncio.Event()

    async def lease(self, stage: int, replica_id: str, *, max_samples: int, wait_s: float) -> pb.LeaseResponse:
        if self._leased == len(self._payloads):
            await asyncio.sleep(wait_s)
            return pb.LeaseResponse()
        response = pb.LeaseResponse()
        samples = []
        for _ in range(min(max_samples, len(self._payloads) - self._leased)):
            samples.append(
                pb.LeasedSample(sample_id="g", lease_id=self._leased + 1, sample=self._payloads[self._leased])
            )
            self._leased += 1
        response.groups.append(pb.LeasedGroup(group_size=8, samples=samples))
        return response

    async def complete(self, stage: int, replica_id: str, samples: list[pb.CompletedSample]) -> pb.CompleteResponse:
        self._left -= len(samples)
        if not self._left:
            self.done.set()
        return pb.CompleteResponse(results=[pb.SampleResult(outcome=pb.OUTCOME_OK) for _ in samples])


async def throughput(scorer: str, count: int) -> None:
    payload = generated(0, COMPLETIONS[scorer], "14").SerializeToString()
    buffer = LocalBuffer([payload] * count)
    pool = ScorerPool(ScorerSettings(scorer, [], {}), processes=1, timeout_s=10)
    await pool.start()
    stop = asyncio.Event()
    child = psutil.Process(pool.pids()[0])
    begun, cpu, child_cpu = time.perf_counter(), time.process_time(), _cpu_s(child)
    task = asyncio.create_task(Puller(buffer, pool, "r", Config(), Stats(1)).run(stop))  # type: ignore[arg-type]
    await buffer.done.wait()
    wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
    child_cpu = _cpu_s(child) - child_cpu
    stop.set()
    await task
    await pool.close()
    print(
        f"throughput {scorer}: {wall / count * 1e6:.0f} µs per score, CPU {cpu / count * 1e6:.0f} µs in the service "
        f"and {child_cpu / count * 1e6:.0f} µs in the pool"
    )


async def steps(scorer: str, count: int) -> None:
    buffer = FakeBuffer()
    await buffer.start()
    config = Config(buffer=BufferConfig(address=buffer.address), reward=RewardConfig(scorer=scorer))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "run.toml")
        await asyncio.to_thread(path.write_text, dump(config))
        service = psutil.Popen([sys.executable, "-m", "services.reward", "-c", str(path)], stderr=subprocess.DEVNULL)
        await buffer.until(lambda: buffer.replicas)
        child = psutil.Process(buffer.replicas[-1].child_pids["scorer-0"])
        buffer.calls.clear()
        before, number = [_cpu_s(process) for process in (service, child)], 0
        for _ in range(count * 8):
            buffer.add(*(generated(number + place, COMPLETIONS[scorer], "14") for place in range(8)))
            number += 8
            await asyncio.sleep(0.012)
        await buffer.until(lambda: len(buffer.scores) == number)
        spent = [_cpu_s(process) - start for process, start in zip((service, child), before, strict=True)]
        service.terminate()
        await asyncio.to_thread(service.wait)
    await buffer.stop()
    print(
        f"steps {scorer}: per 64 samples CPU {spent[0] / count * 1e3:.1f} ms in the service and "
        f"{spent[1] / count * 1e3:.1f} ms in the pool; {len(buffer.calls) / count:.1f} calls"
    )


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def main() -> None:
    await throughput("exact", 20_000)
    await throughput("math", 5_000)
    await steps("exact", 50)
    await steps("math", 50)


if __name__ == "__main__":
    asyncio.run(main())
