"""What SGLang runs of ours: copies into a model are recorded the first time, and made again without it later."""

import importlib.util
import socket
import threading

import pytest
import torch

from services.common.weight_memory import SharedFile
from services.rollout.engines.messages import EngineUnavailableError
from services.rollout.engines.receiver import PLUGIN_DIRECTORY, EngineReceiver

spec = importlib.util.spec_from_file_location("polyhead_receiver", PLUGIN_DIRECTORY / "polyhead_receiver.py")
receiver = importlib.util.module_from_spec(spec)
spec.loader.exec_module(receiver)


class Model(torch.nn.Module):
    """Loads as SGLang's models do: two tensors into one parameter, a padding, a cast."""

    def __init__(self):
        super().__init__()
        self.fused = torch.nn.Parameter(torch.zeros(6, 4))
        self.padded = torch.nn.Parameter(torch.ones(5, 4))
        self.scale = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.calls = 0
        self.factor = 1

    def load_weights(self, weights):
        self.calls += 1
        for name, weight in weights:
            if name in ("q", "k"):
                self.fused.data.narrow(0, 3 * (name == "k"), 3).copy_(weight)
            elif name == "padded":
                self.padded[:3].data.copy_(weight)
                self.padded[3:].data.fill_(0)
            elif self.factor == 1:
                self.scale.data.copy_(weight)
            else:
                self.scale.data.copy_(weight * self.factor)


TENSORS = [("q", (3, 4)), ("k", (3, 4)), ("padded", (3, 4)), ("scale", (2,))]
SIZES = [96, 56]


def make_plan(slots):
    split = [TENSORS[:2], TENSORS[2:]]
    buckets = [
        {"num_bytes": size, "tensors": [[name, "float32", shape] for name, shape in part]}
        for size, part in zip(SIZES, split, strict=True)
    ]
    return receiver.Plan(buckets, slots)


def push(plan, model, seed):
    """As a pause would: each bucket in its slot, then into the model."""
    generator = torch.Generator().manual_seed(seed)
    flat = [torch.randn(size // 4, generator=generator) for size in SIZES]
    plan.check(model)
    with torch.no_grad():
        for bucket, values in enumerate(flat):
            plan.target(bucket).copy_(values.view(torch.uint8))
            plan.load(model, bucket)
    q, k = flat[0].view(2, 3, 4)
    assert torch.equal(model.fused, torch.cat([q, k]))
    assert torch.equal(model.padded, torch.cat([flat[1][:12].view(3, 4), torch.zeros(2, 4)]))
    assert torch.equal(model.scale, (flat[1][12:] * model.factor).double())


@pytest.mark.parametrize("slots", [2, 1])
def test_copies_are_recorded_once(slots):
    model = Model()
    plan = make_plan([torch.empty(96, dtype=torch.uint8) for _ in range(slots)])
    for seed in range(3):
        push(plan, model, seed)
    assert model.calls == 2  # one for each bucket
    assert plan.recorded == 1.0


def test_parameters_that_moved_are_loaded_anew():
    model, plan = Model(), make_plan([torch.empty(96, dtype=torch.uint8) for _ in range(2)])
    push(plan, model, 0)
    model.fused = torch.nn.Parameter(torch.zeros(6, 4))
    push(plan, model, 1)
    push(plan, model, 2)
    assert model.calls == 4


def test_what_is_more_than_copies_is_loaded_each_time():
    model, plan = Model(), make_plan([torch.empty(96, dtype=torch.uint8) for _ in range(2)])
    model.factor = 3
    for seed in range(3):
        push(plan, model, seed)
    assert plan.recorded == 0.5
    assert model.calls == 1 + 3


class Ready(receiver.Receiver):
    """With all buckets arrived."""

    def __init__(self, model):
        super().__init__(model)
        slots = [torch.zeros(96, dtype=torch.uint8) for _ in SIZES]
        self._slots, self._plan, self._arrived = slots, make_plan(slots), [None, None]


@pytest.mark.parametrize("fault", [None, "no such parameter"])
async def test_whoever_watches_hears_how_the_load_went(tmp_path, fault):
    model = Model()
    if fault:

        def refuse(weights):
            raise KeyError(fault)

        model.load_weights = refuse
    inside = Ready(model)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "weights-0.sock"))
    listener.listen()
    threading.Thread(target=receiver._serve, args=(listener, inside), daemon=True).start()
    outside = EngineReceiver(tmp_path, 1, 0)
    gone = await outside.watch()
    gone.close()
    watch = await outside.watch()
    with torch.no_grad():
        inside.load()
    if fault:
        with pytest.raises(EngineUnavailableError, match=fault):
            await watch.outcome()
    else:
        await watch.outcome()
        assert (await outside.timings())["recorded"] == 1.0
    watch.close()


async def test_an_engine_that_ended_has_not_loaded(tmp_path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "weights-0.sock"))
    listener.listen()

    def answer_once():
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"{}\n")

    threading.Thread(target=answer_once).start()
    watch = await EngineReceiver(tmp_path, 1, 0).watch()
    with pytest.raises(EngineUnavailableError, match="load"):
        await watch.outcome()
    watch.close()


class Fp8Model(torch.nn.Module):
    """As SGLang has two projections in block-wise fp8: fused, values and scales."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(256, 128).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = torch.nn.Parameter(torch.zeros(2, 1), requires_grad=False)
        self.calls = 0

    def load_weights(self, weights):
        self.calls += 1
        for name, weight in weights:
            held = self.weight_scale_inv if "scale" in name else self.weight
            rows = len(held) // 2
            held.data.narrow(0, rows * (name[0] == "k"), rows).copy_(weight)


FP8_BUCKET = {
    "num_bytes": 2 * (4 + 128 * 128),
    "tensors": [[f"{name}.weight_scale_inv", "float32", [1, 1]] for name in "qk"]
    + [[f"{name}.weight", "float8_e4m3fn", [128, 128]] for name in "qk"],
}


def test_fp8_is_recorded_too_and_copied_as_bytes():
    model = Fp8Model()
    plan = receiver.Plan([FP8_BUCKET], [torch.empty(FP8_BUCKET["num_bytes"], dtype=torch.uint8)])
    for seed in range(3):
        sent = torch.randint(0, 256, (FP8_BUCKET["num_bytes"],), generator=torch.Generator().manual_seed(seed))
        plan.check(model)
        plan.target(0).copy_(sent.to(torch.uint8))
        plan.load(model, 0)
        held = torch.cat([part.data.view(torch.uint8).flatten() for part in (model.weight_scale_inv, model.weight)])
        assert torch.equal(held, sent.to(torch.uint8))
    assert (model.calls, plan.recorded) == (1, 1.0)


def as_ue8m0(model):
    model.weight_scale_inv.format_ue8m0 = True


def repacked(model):
    model.weight = torch.nn.Parameter(torch.zeros(64, 128, dtype=torch.int32), requires_grad=False)


def plain(model):
    del model.weight_scale_inv


@pytest.mark.parametrize("change", [as_ue8m0, repacked, plain])
def test_fp8_for_a_model_that_has_it_in_another_layout_is_refused_before_anything_is_touched(change):
    model = Fp8Model()
    receiver._check_fp8(model, [FP8_BUCKET])
    change(model)
    inside = receiver.Receiver(model)
    answer = inside.handle(
        {"verb": "prepare", "arguments": {"digest": "d", "buckets": [FP8_BUCKET], "memory": 1 << 20}}
    )
    assert "ValueError" in answer["error"]


def test_shared_buckets_are_read_where_they_are_and_let_go_of(tmp_path, monkeypatch):
    """Copies are recorded the first time, and go on where the buckets are elsewhere."""
    monkeypatch.setenv(receiver.SHARED_VARIABLE, str(tmp_path / "shared"))
    model = Model()
    inside = receiver.Receiver(model)
    split = [TENSORS[:2], TENSORS[2:]]
    buckets = [
        {"num_bytes": size, "tensors": [[name, "float32", shape] for name, shape in part]}
        for size, part in zip(SIZES, split, strict=True)
    ]
    calls = []
    for seed in range(3):
        files = [SharedFile(tmp_path / "shared", size) for size in SIZES]
        values = torch.randn(sum(SIZES) // 4, generator=torch.Generator().manual_seed(seed))
        for file, part in zip(files, values.split([size // 4 for size in SIZES]), strict=True):
            file.tensor.copy_(part.view(torch.uint8))
        places = [{"file": file.name, "handle": "", "device": ""} for file in files]
        prepare = {"digest": "d", "buckets": None, "memory": 0, "shared": places}
        answer = inside.handle({"verb": "prepare", "arguments": prepare})
        if not seed:
            assert answer == {"unknown": True}
            answer = inside.handle({"verb": "prepare", "arguments": prepare | {"buckets": buckets}})
        assert answer == {"ahead": 2}
        assert "error" not in inside.handle({"verb": "receive"})
        inside.load()
        assert torch.equal(model.fused.flatten(), values[:24])
        assert torch.equal(model.padded[:3].flatten(), values[24:36])
        assert torch.equal(model.scale.float(), values[36:])
        assert inside._slots == [], "the trainer may free its buckets"
        calls.append(model.calls)
        for file in files:
            file.close()
    assert calls == [2, 2, 2], "what load_weights did is recorded, and repeated without it"
    missing = inside.handle({"verb": "prepare", "arguments": prepare})
    assert "FileNotFoundError" in missing["error"]
