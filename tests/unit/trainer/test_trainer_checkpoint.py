"""Checkpoints and exports: exact, atomic, and never a damaged one."""

import shutil
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import torch
from google.protobuf import json_format
from transformers import AutoModelForCausalLM, AutoTokenizer

from polyhead.v1 import buffer_pb2 as pb
from services.cli.main import main
from services.common.config import Config
from services.common.errors import ConfigError, FencedError
from services.common.versions import Version
from services.trainer import checkpoint, files
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.batch.samples import decode_groups
from services.trainer.batch.staleness import Clock
from services.trainer.checkpoint import CheckpointState, CheckpointStore
from services.trainer.history import load_forks, record_fork
from services.trainer.model_dir import check_model_dir, export, exported_version
from services.trainer.ranks.group import RankGroup
from services.trainer.step import train_batch
from tests.kit.tiny_model import build_tiny_llama, build_tiny_qwen3
from tests.kit.trainer_batch import make_batch

CLOCK = Clock(Version(1, 0), {1: 0})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_qwen3(tmp_path_factory.mktemp("model") / "m")


def make_config(model):
    return Config(model={"hf_checkpoint": model}, trainer={"optimizer": {"lr": 1e-3, "warmup_steps": 5}})


def state_at(step, backend=None):
    watermark = pb.Watermark(step=step, low_water=2**60, closed_ordinals=[2**60 + 3], dataset_digest="d", seed=7)
    return CheckpointState(
        step=step,
        version=Version(2, step),
        optimizer_steps=backend.optimizer_steps if backend else 0,
        model="/models/m",
        dtype="float32",
        config_digest="c",
        watermark=json_format.MessageToDict(watermark),
    )


def small_tensors(value):
    return {"model": {"w": torch.full((3,), float(value))}, "optimizer": {"step/w": torch.tensor(1.0)}}


def put(store, state, tensors):
    return store.save(state, tensors, store.temporary(state.step), RankGroup())


def train_steps(backend, config, first, count):
    for step in range(first, first + count):
        samples = decode_groups(make_batch(step, groups=2, size=4), vocab_size=128)
        assert train_batch(backend, samples, CLOCK, config)[0].applied


def test_three_steps_save_load_three_steps_equal_six_steps_bit_for_bit(model, tmp_path):
    config = make_config(model)
    straight = TorchBackend(config)
    train_steps(straight, config, 0, 6)

    before = TorchBackend(config)
    train_steps(before, config, 0, 3)
    store = CheckpointStore(tmp_path, keep_last=2)
    put(store, state_at(3, before), before.state())
    torch.rand(5)

    resumed = TorchBackend(config)
    newest = store.load_newest()
    resumed.load_state(newest.tensors, newest.state.optimizer_steps)
    train_steps(resumed, config, 3, 3)

    left, right = straight.state(), resumed.state()
    assert straight.optimizer_steps == resumed.optimizer_steps == 6
    for part in ("model", "optimizer"):
        assert left[part].keys() == right[part].keys()
        assert all(torch.equal(left[part][name], right[part][name]) for name in left[part])


def test_the_random_numbers_go_on_where_they_were(model, tmp_path):
    config = make_config(model)
    backend = TorchBackend(config)
    store = CheckpointStore(tmp_path, keep_last=1)
    put(store, state_at(1, backend), backend.state())
    expected = torch.rand(4)
    TorchBackend(config).load_state(store.load_newest().tensors, 0)
    assert torch.equal(torch.rand(4), expected)


def test_the_state_comes_back_as_it_was(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    put(store, state_at(20), small_tensors(1))
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "step_00000020").iterdir()) == [
        "model-00000.safetensors",
        "optimizer-00000.safetensors",
        "state.json",
    ]
    loaded = store.load_newest()
    assert loaded.state == state_at(20)
    assert loaded.state.watermark_message().closed_ordinals == [2**60 + 3]


def test_only_the_last_ones_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    assert [put(store, state_at(step), small_tensors(step)) for step in (10, 20, 30)] == [10, 10, 20]
    assert store.steps() == [20, 30]


@pytest.mark.parametrize("damage", ["flip", "truncate", "no_state", "no_file", "other_format"])
def test_a_damaged_checkpoint_is_skipped(tmp_path, damage):
    store = CheckpointStore(tmp_path, keep_last=3)
    for step in (10, 20):
        put(store, state_at(step), small_tensors(step))
    newest = tmp_path / "checkpoints" / "step_00000020"
    weights = newest / "model-00000.safetensors"
    if damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif damage == "no_state":
        (newest / "state.json").unlink()
    elif damage == "no_file":
        weights.unlink()
    else:
        document = orjson.loads((newest / "state.json").read_bytes())
        (newest / "state.json").write_bytes(orjson.dumps({**document, "format": 99}))
    assert store.load_newest().state.step == 10
    # The run goes on from there and writes that step again.
    put(store, state_at(20), small_tensors(5))
    assert store.load_newest().tensors["model"]["w"][...].tolist() == [5.0] * 3


class Crash(BaseException):
    """Stands for the process being killed at this very point."""


@pytest.mark.parametrize("point", ["fill", "fsync", "rename"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_crash_while_saving_leaves_the_previous_checkpoint(tmp_path, monkeypatch, point, existing):
    store = CheckpointStore(tmp_path, keep_last=3)
    put(store, state_at(10), small_tensors(10))
    if existing:
        put(store, state_at(20), small_tensors(20))

    def crash(*_):
        raise Crash

    targets = {
        "fill": ("services.trainer.shards.save_file", crash),
        "fsync": ("services.trainer.files.fsync", crash),
        "rename": ("pathlib.Path.rename", crash),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*targets[point])
        with pytest.raises(Crash):
            put(store, state_at(20), small_tensors(21))

    again = CheckpointStore(tmp_path, keep_last=3)
    again.clean()
    loaded = again.load_newest()
    assert loaded.state.step == (20 if existing else 10)
    assert loaded.tensors["model"]["w"][...][0] == loaded.state.step
    assert not list((tmp_path / "checkpoints").glob(f"{files.TEMPORARY}*"))


def test_what_was_written_is_read_back_before_it_counts(tmp_path, monkeypatch):
    def write_wrong(directory, state, files):
        original(directory, state, files)
        (directory / "model-00000.safetensors").write_bytes(b"rotten")

    original = checkpoint._write_state
    monkeypatch.setattr(checkpoint, "_write_state", write_wrong)
    with pytest.raises(OSError, match="does not verify"):
        put(CheckpointStore(tmp_path, keep_last=1), state_at(1), small_tensors(1))


def test_forks_of_all_epochs_are_remembered(tmp_path):
    assert load_forks(tmp_path) == {}
    record_fork(tmp_path, 1, 0)
    assert record_fork(tmp_path, 3, 40) == {1: 0, 3: 40}
    assert load_forks(tmp_path) == {1: 0, 3: 40}


@pytest.mark.parametrize("build", [build_tiny_qwen3, build_tiny_llama])
def test_an_export_is_a_directory_that_transformers_loads(tmp_path, build):
    source = build(tmp_path / "source")
    (source / "notes.bin").write_bytes(b"old weights")
    config = make_config(source)
    backend = TorchBackend(config)
    train_steps(backend, config, 0, 2)
    target = tmp_path / "run" / "hf"
    export(target, source, Version(2, 5), backend.save_pretrained)
    assert exported_version(target) == Version(2, 5)
    assert exported_version(source) is None
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    mine = backend.weights()
    assert all(torch.equal(weight, mine[name]) for name, weight in loaded.state_dict().items() if name in mine)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer("1+1=")["input_ids"] == AutoTokenizer.from_pretrained(source)("1+1=")["input_ids"]
    assert not (target / "notes.bin").exists()
    assert [path.name for path in target.parent.iterdir()] == ["hf"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("build", [build_tiny_qwen3, build_tiny_llama])
def test_a_checkpoint_converts_to_what_the_run_exports(tmp_path, build, dtype, capsys):
    source = build(tmp_path / "source")
    (source / "notes.bin").write_bytes(b"old weights")
    config = make_config(source)
    config.model.dtype = dtype
    backend = TorchBackend(config)
    train_steps(backend, config, 0, 2)
    store, exported, converted = CheckpointStore(tmp_path, keep_last=1), tmp_path / "hf", tmp_path / "converted"
    put(store, replace(state_at(2, backend), model=str(source), dtype=dtype), backend.state())
    export(exported, source, Version(2, 2), backend.save_pretrained)
    directory = store.load_newest().directory
    assert main(["convert", str(directory), str(converted)]) == 0
    assert capsys.readouterr().out == f"{converted}: e2.s2, step 2\n"
    assert sorted(path.name for path in converted.iterdir()) == sorted(path.name for path in exported.iterdir())
    for path in exported.iterdir():
        assert (converted / path.name).read_bytes() == path.read_bytes(), path.name
    assert main(["convert", str(directory), str(converted)]) == 2
    assert capsys.readouterr().err == f"polyhead: OUT: {converted} exists\n"
    source.rename(tmp_path / "moved")
    assert main(["convert", str(directory), str(tmp_path / "again")]) == 2
    assert "--hf-checkpoint: " in capsys.readouterr().err
    arguments = ["convert", str(directory), str(tmp_path / "again"), "--hf-checkpoint", str(tmp_path / "moved")]
    assert main(arguments) == 0
    (directory / "optimizer-00000.safetensors").unlink()
    assert main(["convert", str(directory), str(tmp_path / "third")]) == 2
    assert "CHECKPOINT_DIR: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: shutil.rmtree(path), "is not a directory"),
        (lambda path: (path / "config.json").unlink(), "cannot be read: No such file"),
        (lambda path: (path / "config.json").write_text("{"), "is not JSON"),
        (lambda path: (path / "model.safetensors").unlink(), r"holds no \*\.safetensors"),
        (lambda path: [p.unlink() for p in path.glob("tokenizer*")], "holds no tokenizer"),
    ],
)
def test_an_incomplete_model_directory_is_refused_in_one_line(tmp_path, spoil, reason):
    directory = build_tiny_qwen3(tmp_path / "m")
    check_model_dir(directory)
    spoil(directory)
    with pytest.raises(ConfigError, match=rf"model\.hf_checkpoint: .*{reason}") as caught:
        check_model_dir(directory)
    assert "\n" not in str(caught.value)


def test_an_unset_model_directory_says_so():
    with pytest.raises(ConfigError, match=r"model\.hf_checkpoint: is not set"):
        check_model_dir(Path())


def test_checkpoints_of_another_model_are_refused(model, tmp_path):
    other = TorchBackend(make_config(build_tiny_qwen3(tmp_path / "other", hidden=32)))
    with pytest.raises(ConfigError, match="another model"):
        TorchBackend(make_config(model)).load_state(other.state(), 0)


def test_earlier_checkpoints_can_be_given_up(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        put(store, state_at(step), small_tensors(step))
    store.keep_only(2)
    assert store.steps() == [2, 3]


def test_the_newest_epoch_is_known_from_damaged_checkpoints_too(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=3)
    assert store.newest_epoch() == 0
    put(store, state_at(1), small_tensors(1))
    put(store, state_at(2), small_tensors(2))
    (tmp_path / "checkpoints" / "step_00000001" / "model-00000.safetensors").unlink()
    (tmp_path / "checkpoints" / "step_00000002" / "state.json").write_text("{")
    assert store.newest_epoch() == 2


def test_a_superseded_trainer_replaces_no_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    put(store, state_at(5), small_tensors(2))
    with pytest.raises(FencedError, match="1 was superseded by 2"):
        put(store, replace(state_at(5), version=Version(1, 5)), small_tensors(1))
    assert store.load_newest().tensors["model"]["w"][...][0] == 2


def test_what_a_superseded_trainer_wrote_first_is_not_resumed_from(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=3)
    for step in (5, 10, 15):
        put(store, replace(state_at(step), version=Version(1, step)), small_tensors(step))
    assert store.load_newest({1: 0}).state.step == 15
    assert store.load_newest({1: 0, 2: 15}).state.step == 15
    assert store.load_newest({1: 0, 2: 10}).state.step == 10
    put(store, state_at(15), small_tensors(2))
    assert store.load_newest({1: 0, 2: 10}).state.version == Version(2, 15)
