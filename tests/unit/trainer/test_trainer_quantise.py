"""Block-wise fp8, bit for bit against an independent quantiser in float64."""

import numpy as np
import pytest
import torch

from services.common.fp8 import dequantise
from services.trainer.weights.quantise import FP8, quantise
from tests.kit.fp8_reference import e4m3_values, quantise_reference, round_to_e4m3


def quantised(weight):
    n, k = weight.shape
    values, scales = torch.empty(n, k, dtype=FP8), torch.empty(-(-n // 128), -(-k // 128))
    quantise(weight, values, scales)
    return values, scales


def assert_exact(weight):
    values, scales = quantised(weight)
    codes, expected = quantise_reference(weight.float().numpy())
    assert np.array_equal(scales.numpy(), expected)
    assert np.array_equal(values.view(torch.uint8).numpy(), codes)


def test_the_references_rounding_is_that_of_torch():
    table = e4m3_values()
    between = [np.nextafter(middle, to) for middle in (table[:-1] + table[1:]) / 2 for to in (0.0, 1e9)]
    samples = np.concatenate([table, (table[:-1] + table[1:]) / 2, between]).astype(np.float32).astype(np.float64)
    samples = np.concatenate([samples, -samples])
    codes = torch.from_numpy(samples.astype(np.float32)).to(FP8).view(torch.uint8).numpy()
    assert np.array_equal(codes, round_to_e4m3(samples))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (1, 1), (130, 127), (127, 300), (5, 1000)])
def test_values_and_scales_are_exact_at_ragged_shapes(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    assert_exact((0.02 * torch.randn(shape, generator=generator)).to(dtype))


@pytest.mark.parametrize(
    "fill",
    [0.0, -0.0, 1e-45, -1e-40, 2.0**-133, 1e-38, 3.3e38, -3.38e38, 448.0, 1.0],
    ids=lambda value: f"{value:g}",
)
def test_blocks_of_one_number_are_exact(fill):
    assert_exact(torch.full((130, 130), fill))


def test_blocks_of_very_different_sizes_do_not_touch_each_other():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    weight[:128, :128] *= 1e30
    weight[128:, :128] *= 1e-42
    weight[:128, 128:] = 0
    assert_exact(weight)
    assert_exact(weight.to(torch.bfloat16))


def test_every_magnitude_within_a_block_is_exact():
    """From the largest down into what is subnormal in e4m3, and to zero."""
    exponents = torch.linspace(0, -14, 128 * 128).view(128, 128)
    assert_exact(2.0**exponents)
    assert_exact(-(2.0**exponents).to(torch.bfloat16))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_shows_in_its_scale_and_in_no_other(bad):
    weight = torch.ones(256, 128)
    weight[200, 3] = bad
    _, scales = quantised(weight)
    assert torch.isfinite(scales).flatten().tolist() == [True, False]


def test_rows_of_a_larger_tensor_are_read_where_they_are():
    stack = torch.randn(3, 300, 200, generator=torch.Generator().manual_seed(2))
    assert_exact(stack[1, 130:])


def test_a_weight_comes_back_within_half_a_step():
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(3))
    again = dequantise(*quantised(weight), torch.float32)
    spread = quantised(weight)[1].repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert ((again - weight).abs() <= (weight.abs() / 16).maximum(spread * 2.0**-10) * (1 + 1e-6)).all()


def test_a_place_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="into"):
        quantise(torch.ones(130, 10), torch.empty(130, 10, dtype=FP8), torch.empty(1, 1))
