"""Malformed requests to a buffer process on a real Valkey: python -m tests.property.fuzz --seconds 60 --seed 0.

Each is answered in a way that says what is wrong, and a refusal has changed nothing. Between them an honest run goes
on; it must find nothing that stops it, and the ledger balanced. The process must keep its size.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import grpc
import psutil
import redis

from polyhead.v1 import buffer_pb2, sample_pb2
from services.common.process import die_with_parent, free_port
from services.common.rpc import MIB
from tests.kit import valkey
from tests.kit.fuzz import torn
from tests.kit.fuzz.calls import check_refusal
from tests.kit.fuzz.mutations import Mutator
from tests.kit.fuzz.scene import Scene

ROOT = Path(__file__).parents[2]
GROUP_SIZE = 2
_CONFIG = """
[run]
dir = "{directory}"
[data]
prompt_data = "{directory}/rows.jsonl"
[batch]
rollout_batch_size = 2
n_samples_per_prompt = {group_size}
global_batch_size = 4
[store]
url = "{store}"
[buffer]
address = "{address}"
lease_ttl_s = 0.5
"""
SERVICE = buffer_pb2.DESCRIPTOR.services_by_name["BufferService"]
PATH = f"/{SERVICE.full_name}/"
MESSAGE_BYTES = 64 * MIB
_ROUND = 25
"""Malformed requests between two rounds of the honest run."""
_CALL_S = 120.0
"""No call is answered so late, however busy the machine."""
_GROWTH_MB = 128
"""What the process may grow by once it has had the largest messages, of whose memory it keeps some."""
_PEAK_MB = 8 * 64
"""While a message of 64 MiB is received and parsed: some copies of it, but nothing made of its parts."""
_LARGE_ROUNDS = 5
"""A message that is kept after its refusal makes the process larger with each."""
_LAST_STEPS = 3


class Fuzz:
    """`seen` counts what was answered."""

    def __init__(self, server: valkey.Valkey, process: psutil.Process, address: str, seed: int) -> None:
        self._rng = random.Random(seed)
        self._process = process
        self._address = address
        self._store = redis.Redis.from_url(server.url)
        options = [("grpc.max_send_message_length", 2 * MESSAGE_BYTES), ("grpc.max_receive_message_length", -1)]
        # The buffer that this harness has started, on this machine.
        self._channel = grpc.insecure_channel(address, options=options)
        self._scene = Scene(self._channel, self._rng, GROUP_SIZE)
        self._mutator = Mutator(self._rng, sample_pb2.Sample)
        self.seen: Counter[str] = Counter()

    def run(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        grpc.channel_ready_future(self._channel).result(timeout=30)
        self._scene.advance()
        before = self._memory("VmRSS")
        self._send_large()
        kept = self._memory("VmRSS")
        for _ in range(_LARGE_ROUNDS - 1):
            self._send_large()
        while time.monotonic() < until or not self._has_seen_all():
            for _ in range(_ROUND):
                self._send_one()
            self._send_torn()
            self._scene.advance()
        self._end(time.monotonic() + 60)
        self.seen["grown_mb"] = self._memory("VmRSS") - kept
        self.seen["peak_mb"] = self._memory("VmHWM") - before
        self.seen["steps trained"] = self._scene.trained
        assert self.seen["grown_mb"] < _GROWTH_MB, dict(self.seen)
        assert self.seen["peak_mb"] < _PEAK_MB, dict(self.seen)

    def _has_seen_all(self) -> bool:
        """Whether each method has answered and refused."""
        names = [method.name for method in SERVICE.methods]
        return all(self.seen[f"{name} OK"] and self.seen[f"{name} INVALID_ARGUMENT"] for name in names)

    def _memory(self, what: str) -> int:
        """MiB of the process, by the kernel's name for it."""
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith(what)).split()[1]) >> 10

    def _send_one(self) -> None:
        method, message = self._scene.request()
        self._send(method, self._mutator.mutated(message))

    def _send_large(self) -> None:
        """Over the limit by a byte; on it, and nonsense; of many parts, each of which takes memory."""
        for method, data in (
            ("Complete", bytes(MESSAGE_BYTES + 1)),
            ("Complete", bytes(MESSAGE_BYTES)),
            ("Submit", b"\x12\x00" * (MESSAGE_BYTES // 2)),
            ("Import", b"\x12\x02\x12\x00" * (4 * MIB)),
        ):
            assert self._send(method, data) is not None

    def _send_torn(self) -> None:
        """Only what reads: nobody waits for the end of it, and later refusals are to find the store as it was."""
        host, port = self._address.split(":")
        method = self._rng.choice(("Fetch", "GetLedger", "ListReplicas", "ListSamples"))
        torn.send(self._rng, (host, int(port)), PATH + method, self._mutator.mutated(self._scene.request()[1]))
        assert self._send(self._rng.choice(("Nope", "", "Lease/x", "lease")), b"") == grpc.StatusCode.UNIMPLEMENTED

    def _send(self, method: str, data: bytes) -> grpc.StatusCode | None:
        """The code of the refusal, None where there was an answer. Raises AssertionError for one that says nothing."""
        call = self._channel.unary_unary(PATH + method)
        before = self._changes()
        try:
            call(data, timeout=0.2 if method == "Lease" else _CALL_S)
        except grpc.RpcError as error:
            said = f"{method}({len(data)} bytes {data[:300].hex()}): {error.code()} {error.details()}"
            code = self._checked(method, error, said)
            changed = self._changes() - before
            assert not changed or code == grpc.StatusCode.DEADLINE_EXCEEDED, f"{said}: {changed} changes were made"
            return code
        self.seen[f"{method} OK"] += 1
        return None

    def _checked(self, method: str, error: grpc.RpcError, said: str) -> grpc.StatusCode:
        code = error.code()
        self.seen[f"{method if code != grpc.StatusCode.UNIMPLEMENTED else 'unknown'} {code.name}"] += 1
        too_large = code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in error.details()
        waited = code == grpc.StatusCode.DEADLINE_EXCEEDED and method == "Lease"
        if code != grpc.StatusCode.UNIMPLEMENTED and not too_large and not waited:
            check_refusal(error, said)
        return code

    def _changes(self) -> int:
        """Of the store's data, since it was started."""
        return int(self._store.info("persistence")["rdb_changes_since_last_save"])

    def _end(self, deadline: float) -> None:
        """The honest run goes on, whatever was stored."""
        wanted = self._scene.trained + _LAST_STEPS
        while self._scene.trained < wanted:
            assert time.monotonic() < deadline, f"nothing is trained any more: {self._scene.ledger()}"
            self._scene.advance()
            time.sleep(0.1)


@contextmanager
def serving(directory: Path) -> Iterator[tuple[valkey.Valkey, psutil.Process, str]]:
    """A buffer process on a Valkey of its own, both at a low priority: others are not held up."""
    address = f"127.0.0.1:{free_port()}"
    rows = "".join(json.dumps({"input": f"{number}+1="}) + "\n" for number in range(50))
    (directory / "rows.jsonl").write_text(rows)
    with valkey.running(max_memory_mb=1024) as server:
        text = _CONFIG.format(directory=directory, group_size=GROUP_SIZE, store=server.url, address=address)
        (directory / "run.toml").write_text(text)
        with (directory / "buffer.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "services.buffer", "-c", str(directory / "run.toml")],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'protos'}"},
                stdout=log,
                stderr=log,
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
        watched = psutil.Process(process.pid)
        try:
            _wait_for(address, process)
            for one in (watched, psutil.Process(server.pid)):
                one.nice(5)
            yield server, watched, address
            assert process.poll() is None, f"the buffer ended with {process.returncode}"
        finally:
            process.kill()
            process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    host, port = address.split(":")
    for _ in range(600):
        assert process.poll() is None, "the buffer did not start"
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the buffer does not listen")


def run(seconds: float, seed: int) -> Counter[str]:
    """What was seen. Raises AssertionError with the seed, the request and the end of the buffer's log."""
    with tempfile.TemporaryDirectory() as directory, serving(Path(directory)) as (server, process, address):
        fuzz = Fuzz(server, process, address, seed)
        try:
            fuzz.run(seconds)
        except (AssertionError, grpc.RpcError) as error:
            log = (Path(directory) / "buffer.log").read_text(errors="replace")[-3000:]
            again = f"python -m tests.property.fuzz --seconds {seconds:g} --seed {seed}"
            raise AssertionError(f"{error}\nagain: {again}\n{dict(fuzz.seen)}\n--- buffer.log\n{log}") from error
        return fuzz.seen


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.property.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, help="a random one by default")
    asked = parser.parse_args()
    seed = asked.seed if asked.seed is not None else secrets.randbelow(1 << 31)
    print(f"{asked.seconds:g} s, seed {seed}", flush=True)
    print(json.dumps(dict(sorted(run(asked.seconds, seed).items())), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
