"""Block-wise fp8 against a reference without torch: e4m3 decoded from its bits, the nearest value found by search."""

import numpy as np
import pytest
import torch

from services.trainer.weights.fp8 import BLOCK, dequantise_blocks, quantise_blocks

# Sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7f is NaN, and there is no infinity.
CODES = np.arange(0x7F)
EXPONENTS, MANTISSAS = CODES >> 3, CODES & 7
GRID = np.where(EXPONENTS == 0, MANTISSAS * 2.0**-9, (1 + MANTISSAS / 8) * 2.0 ** (EXPONENTS - 7.0))


def nearest_codes(magnitudes):
    """Ties go to the even code."""
    above = np.clip(np.searchsorted(GRID, magnitudes), 1, len(GRID) - 1)
    below = above - 1
    to_above, to_below = GRID[above] - magnitudes, magnitudes - GRID[below]
    take_above = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return np.where(take_above, above, below)


def reference(weight):
    """One matrix, block by block: codes with the sign in the highest bit, and scales."""
    rows, columns = weight.shape
    codes = np.zeros(weight.shape, np.uint8)
    scales = np.zeros((-(-rows // BLOCK), -(-columns // BLOCK)), np.float32)
    for i, j in np.ndindex(scales.shape):
        where = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
        block = weight[where]
        scales[i, j] = max(np.abs(block).max() / np.float32(448), np.finfo(np.float32).tiny)
        quotients = block / scales[i, j]
        assert quotients.dtype == np.float32
        found = nearest_codes(np.abs(quotients).astype(np.float64))
        codes[where] = found | (np.signbit(quotients) << 7)
    return codes, scales


def drawn(shape, dtype=torch.float32, spread=1.0):
    generator = torch.Generator().manual_seed(len(shape) * 1000 + shape[-1])
    magnitudes = torch.exp(spread * torch.randn(shape, generator=generator))
    return (torch.randn(shape, generator=generator) * magnitudes).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 384), (130, 200), (1, 1), (128, 129)])
@pytest.mark.parametrize("spread", [0.1, 4.0])
def test_values_and_scales_are_the_references(shape, dtype, spread):
    weight = drawn(shape, dtype, spread)
    values, scales = quantise_blocks(weight)
    assert values.shape == weight.shape
    assert values.is_contiguous()
    assert scales.is_contiguous()
    codes, expected = reference(weight.float().numpy())
    assert np.array_equal(scales.numpy(), expected)
    assert np.array_equal(values.view(torch.uint8).numpy(), codes)


def test_experts_are_quantised_one_by_one():
    weight = drawn((3, 130, 257), torch.bfloat16)
    values, scales = quantise_blocks(weight)
    assert scales.shape == (3, 2, 3)
    for number, expert in enumerate(weight):
        one, its = quantise_blocks(expert)
        assert torch.equal(values[number].view(torch.uint8), one.view(torch.uint8))
        assert torch.equal(scales[number], its)


def test_what_is_on_the_grid_is_kept_exactly():
    """Every finite e4m3 value, times a power of two."""
    grid = np.concatenate([GRID, -GRID]).astype(np.float32)
    weight = torch.from_numpy(np.resize(grid, (BLOCK, BLOCK))) * 2.0**-5
    assert torch.equal(dequantise_blocks(*quantise_blocks(weight)), weight)


def test_ties_go_to_the_even_neighbour():
    ties = torch.tensor([448.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10])  # the first makes the scale 1
    values, scales = quantise_blocks(ties[None])
    assert scales.item() == 1.0
    assert values.float().tolist() == [[448.0, 16.0, 20.0, -16.0, 0.0, 2.0**-8]]


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-40, 1e-36, 3e38])
def test_no_magnitude_makes_nan(magnitude):
    weight = torch.full((2, 130), magnitude)
    values, scales = quantise_blocks(weight)
    assert torch.isfinite(scales).all()
    back = dequantise_blocks(values, scales)
    assert torch.isfinite(back).all()
    # Below the smallest normal scale, an absolute error of half the least value on the grid.
    assert torch.allclose(back, weight, rtol=2.0**-4, atol=2.0**-136)


def test_an_error_is_at_most_half_a_step():
    weight = drawn((200, 300), spread=2.0)
    values, scales = quantise_blocks(weight)
    spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:200, :300]
    bound = torch.maximum(weight.abs() * 2.0**-4, spread * 2.0**-10)
    assert ((dequantise_blocks(values, scales) - weight).abs() <= bound * (1 + 1e-6)).all()


def test_what_is_not_finite_shows():
    weight = torch.ones(2, 300)
    weight[0, 5], weight[1, 290] = float("nan"), float("inf")
    _, scales = quantise_blocks(weight)
    assert torch.isfinite(scales).tolist() == [[False, True, False]]
