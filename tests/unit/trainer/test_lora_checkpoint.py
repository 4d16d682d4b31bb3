"""Checkpoints of adapters: without the base, exact, of one base and one setting only; what is made of them."""

from dataclasses import replace

import orjson
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from services.cli.main import main
from services.common.config import Config
from services.common.errors import ConfigError
from services.common.versions import Version
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.batch.samples import decode_groups
from services.trainer.batch.staleness import Clock
from services.trainer.checkpoint import CheckpointState, CheckpointStore
from services.trainer.lora import check_same, lora_state
from services.trainer.model_dir import export
from services.trainer.ranks.group import RankGroup
from services.trainer.step import train_batch
from tests.kit.lora import filled
from tests.kit.tiny_model import build_tiny_llama, build_tiny_qwen3
from tests.kit.trainer_batch import make_batch

CLOCK = Clock(Version(1, 0), {1: 0})
LORA = {"rank": 4, "alpha": 8}
SOME = {"rank": 3, "alpha": 7, "use_rslora": True, "target_modules": ["q_proj", "layers.1.mlp.down_proj"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_qwen3(tmp_path_factory.mktemp("model") / "m")


def make_config(model, lora=LORA, dtype="float32"):
    return Config(
        model={"hf_checkpoint": model, "dtype": dtype},
        trainer={"optimizer": {"lr": 1e-3, "weight_decay": 0.1}, "lora": lora},
    )


def saved(backend, model, run_dir, dtype="float32"):
    """The checkpoint, and the store that it is in."""
    steps = backend.optimizer_steps
    lora = lora_state(backend.adapters, model)
    state = CheckpointState(steps, Version(2, steps), steps, str(model), dtype, "c", None, lora)
    store = CheckpointStore(run_dir, keep_last=1)
    store.save(state, backend.state(), store.temporary(steps), RankGroup())
    return store.load_newest()


def train_steps(backend, config, first, count):
    for step in range(first, first + count):
        samples = decode_groups(make_batch(step, groups=2, size=4), vocab_size=128)
        assert train_batch(backend, samples, CLOCK, config)[0].applied


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_three_steps_save_load_three_steps_equal_six_steps_bit_for_bit(model, tmp_path, dtype):
    config = make_config(model, dtype=dtype)
    straight, before = TorchBackend(config), TorchBackend(config)
    train_steps(straight, config, 0, 6)
    train_steps(before, config, 0, 3)
    checkpoint = saved(before, model, tmp_path)
    assert checkpoint.state.lora == lora_state(before.adapters, model)
    assert sorted(path.name for path in checkpoint.directory.iterdir()) == [
        *(f"{part}-00000.safetensors" for part in ("adapter", "optimizer", "rng")),
        "state.json",
    ]
    config.run.seed = 7  # A begins as something else
    resumed = TorchBackend(config)
    resumed.load_state(checkpoint.tensors, checkpoint.state.optimizer_steps)
    train_steps(resumed, config, 3, 3)
    left, right = straight.state(), resumed.state()
    for part in ("adapter", "optimizer"):
        assert left[part].keys() == right[part].keys()
        assert all(torch.equal(left[part][name], right[part][name]) for name in left[part])
    assert all(torch.equal(tensor, dict(resumed.tensors())[name]) for name, tensor in straight.tensors())


def test_a_run_goes_on_from_the_same_base_and_settings_only(model, tmp_path):
    backend = filled(make_config(model))
    own = lora_state(backend.adapters, model)
    check_same(own, replace(own), "model.hf_checkpoint")
    check_same(None, None, "model.hf_checkpoint")
    named = {"rank": 4, "alpha": 8, "target_modules": [*reversed(own.target_modules)]}
    assert lora_state(filled(make_config(model, named)).adapters, model) == own
    moved = build_tiny_qwen3(tmp_path / "moved")
    assert lora_state(backend.adapters, moved) == own
    other = build_tiny_qwen3(tmp_path / "other", seed=1)
    for saved_state, reason in (
        (lora_state(backend.adapters, other), r"^model\.hf_checkpoint: holds other weights than"),
        (replace(own, rank=8), r"^trainer\.lora\.rank: the run's checkpoints have 8, and this run 4"),
        (replace(own, alpha=9), r"^trainer\.lora\.alpha: .* 9, and this run 8"),
        (replace(own, use_rslora=True), r"^trainer\.lora\.use_rslora: "),
        (replace(own, target_modules=["q_proj"]), r"^trainer\.lora\.target_modules: "),
        (None, r"^trainer\.lora\.rank: .* are of all weights, and this run trains adapters of rank 4"),
    ):
        with pytest.raises(ConfigError, match=reason):
            check_same(own, saved_state, "model.hf_checkpoint")
    with pytest.raises(ConfigError, match=r"are of adapters of rank 4, and this run trains all weights"):
        check_same(None, own, "model.hf_checkpoint")
    whole = TorchBackend(Config(model={"hf_checkpoint": model}))
    for one, other_one in ((whole, backend), (backend, whole)):
        with pytest.raises(ConfigError, match="another model"):
            one.load_state(other_one.state(), 0)


@pytest.mark.parametrize(("build", "dtype"), [(build_tiny_qwen3, "float32"), (build_tiny_llama, "bfloat16")])
def test_a_checkpoint_converts_to_the_merged_model_that_is_exported(tmp_path, build, dtype, capsys):
    source = build(tmp_path / "source")
    backend = filled(make_config(source, dtype=dtype))
    directory = saved(backend, source, tmp_path, dtype).directory
    exported, converted = tmp_path / "hf", tmp_path / "converted"
    export(exported, source, Version(2, 0), backend.save_pretrained)
    assert main(["convert", str(directory), str(converted)]) == 0
    assert sorted(path.name for path in converted.iterdir()) == sorted(path.name for path in exported.iterdir())
    for path in exported.iterdir():
        assert (converted / path.name).read_bytes() == path.read_bytes(), path.name
    loaded = AutoModelForCausalLM.from_pretrained(exported, dtype="auto").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in backend.tensors())
    capsys.readouterr()
    other = build(tmp_path / "other", seed=1)
    assert main(["convert", str(directory), str(tmp_path / "no"), "--hf-checkpoint", str(other)]) == 2
    assert "--hf-checkpoint: " in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("lora", [LORA, SOME])
def test_its_adapters_are_a_directory_that_peft_loads(model, tmp_path, lora, capsys):
    backend = filled(make_config(model, lora))
    directory, out = saved(backend, model, tmp_path).directory, tmp_path / "adapter"
    assert main(["convert", str(directory), str(out), "--adapter"]) == 0
    assert capsys.readouterr().out == f"{out}: e2.s0, step 0\n"
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    said = orjson.loads((out / "adapter_config.json").read_bytes())
    assert said["base_model_name_or_path"] == str(model)
    assert sorted(said["target_modules"]) == backend.adapters.targets
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, out).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        backend.model.set_attn_implementation("sdpa")
        assert torch.equal(loaded(ids).logits, backend.model(input_ids=ids).logits)
    stored = load_file(out / "adapter_model.safetensors")
    assert len(stored) == len(backend.adapters.tensors)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_a_checkpoint_of_all_weights_has_no_adapters(model, tmp_path, capsys):
    backend = TorchBackend(Config(model={"hf_checkpoint": model}))
    checkpoint = saved(backend, model, tmp_path)
    assert checkpoint.state.lora is None
    assert main(["convert", str(checkpoint.directory), str(tmp_path / "out"), "--adapter"]) == 2
    assert capsys.readouterr().err.startswith("polyhead: --adapter: ")
    # As checkpoints were before there were adapters.
    document = orjson.loads((checkpoint.directory / "state.json").read_bytes())
    del document["lora"]
    (checkpoint.directory / "state.json").write_bytes(orjson.dumps(document))
    assert CheckpointStore(tmp_path, keep_last=1).load_newest().state == checkpoint.state
