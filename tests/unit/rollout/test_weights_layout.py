"""A push is checked against the engine's parameters before anything is sent."""

from __future__ import annotations

import pytest

from polyhead.v1 import weights_pb2
from services.common.errors import ConfigError, InvalidArgumentError
from services.rollout.layout import ModelLayout

SHAPES = {"a": (2, 3), "b": (4,)}


def manifest(tensors: dict[str, tuple[int, ...]], dtype: str = "float32", size: int = 4) -> weights_pb2.WeightManifest:
    buckets = []
    for name, shape in tensors.items():
        spec = weights_pb2.TensorSpec(name=name, dtype=dtype, shape=shape)
        count = 1
        for side in shape:
            count *= side
        buckets.append(weights_pb2.WeightBucket(tensors=[spec], num_bytes=count * size))
    return weights_pb2.WeightManifest(buckets=buckets)


def test_a_complete_manifest_passes_with_or_without_a_tied_head():
    layout = ModelLayout(SHAPES)
    layout.check(manifest(SHAPES))
    layout.check(manifest(SHAPES | {"lm_head.weight": (9, 9)}))
    ModelLayout(SHAPES | {"lm_head.weight": (9, 9)}).check(manifest(SHAPES, "bfloat16", 2))


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"a": (2, 3)}, "b: not sent"),
        ({"a": (3, 2), "b": (4,)}, r"a: shape \[3, 2\], the engine's is \[2, 3\]"),
        (SHAPES | {"c": (1,)}, "c: the engine's model has no such parameter"),
    ],
)
def test_what_does_not_fit_is_named(sent, message):
    with pytest.raises(InvalidArgumentError, match=message):
        ModelLayout(SHAPES).check(manifest(sent))


def test_broken_manifests_are_refused():
    layout = ModelLayout({})
    with pytest.raises(InvalidArgumentError, match="at least one bucket"):
        layout.check(weights_pb2.WeightManifest())
    with pytest.raises(InvalidArgumentError, match="unknown dtype 'float3'"):
        layout.check(manifest(SHAPES, "float3"))
    with pytest.raises(InvalidArgumentError, match=r"buckets\[0\].num_bytes: 1 tensors of 24 bytes, not 48"):
        layout.check(manifest(SHAPES, "float32", 8))
    twice = manifest(SHAPES)
    twice.buckets.append(twice.buckets[0])
    with pytest.raises(InvalidArgumentError, match="sent twice"):
        layout.check(twice)


def test_a_known_layout_is_not_checked_again():
    layout = ModelLayout(SHAPES)
    good, bad = manifest(SHAPES), manifest({"a": (2, 3)})
    good.layout_digest = bad.layout_digest = "x"
    layout.check(good)
    layout.check(bad)


def test_directories_are_read_from_their_headers(tiny_model, tmp_path):
    layout = ModelLayout.of_directory(tiny_model)
    layout.check_directory(tiny_model)
    with pytest.raises(InvalidArgumentError, match="no safetensors"):
        layout.check_directory(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InvalidArgumentError, match="not a safetensors file"):
        layout.check_directory(tmp_path)
    with pytest.raises(ConfigError, match="not a safetensors file"):
        ModelLayout.of_directory(tmp_path)
