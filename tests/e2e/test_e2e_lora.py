"""A whole run that trains adapters over two ranks: its engine ends with what one has that loaded the export."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from tests.kit.engine_process import ADMIN_KEY, EngineProcess, start_torch_engine
from tests.kit.runs import Run

STEPS = 6


def checksums(engine: EngineProcess) -> dict[str, str]:
    request = urllib.request.Request(
        f"{engine.url}/weights_checker",
        data=json.dumps({"action": "checksum"}).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {ADMIN_KEY}"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        (rank,) = json.load(response)["ranks"]
        return rank["checksums"]


@pytest.mark.long
@pytest.mark.timeout(240)
def test_the_engine_ends_with_what_one_has_that_loaded_the_export(
    tmp_path: Path, inputs: Path, flags: list[str]
) -> None:
    lora = ("--trainer.lora.rank", "8", "--trainer.ranks", "2", "--lr", "1e-3", "--model.dtype", "bfloat16")
    lora += ("--rm-type", "random")
    kl = ("--use-kl-loss", "--kl-loss-coef", "0.01", "--kl-loss-type", "k3")
    with start_torch_engine(inputs / "model", context_length=64, flags=("--dtype", "bfloat16")) as engine:
        base = checksums(engine)
        external = ("--rollout.engine.external", json.dumps([engine.url]))
        run = Run(
            tmp_path / "run",
            *(*flags, *lora, *kl, *external, "--num-rollout", str(STEPS), "--run-dir", str(tmp_path / "run")),
            environment={"POLYHEAD_ROLLOUT__ENGINE__ADMIN_KEY": ADMIN_KEY},
        )
        assert run.finish(within_s=180) == 0, run.tail()
        trained = checksums(engine)
    with start_torch_engine(run.dir / "hf", context_length=64, flags=("--dtype", "bfloat16")) as loaded:
        assert checksums(loaded) == trained
    changed = {name for name in trained if trained[name] != base[name]}
    assert changed == {name for name in trained if "_proj.weight" in name}
    lines = run.steps()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[0]["kl"] == 0.0
    # Equal weights, in bfloat16 on both sides.
    assert all(line["mismatch_kl_fresh"] < 1e-2 for line in lines if line["mismatch_kl_fresh"] is not None)
    pushed = {push["version"] for push in run.lines("pushes") if push["ok"]}
    assert {f"e1.s{step}" for step in range(STEPS + 1)} <= pushed
    (*_, last) = sorted((run.dir / "checkpoints").iterdir())
    assert not list(last.glob("model-*"))
    assert len(list(last.glob("adapter-*"))) == 2
    assert run.left_behind() == []
