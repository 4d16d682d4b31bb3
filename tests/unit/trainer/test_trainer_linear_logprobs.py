"""Chunked log-probs and entropies from hidden states, against torch's own autograd, and the memory they take."""

import pytest
import torch

from services.trainer.backends.torch.linear_logprobs import linear_logprobs


def make(count, *, width=6, vocabulary=11, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(count)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    return (
        draw(count, width),
        draw(vocabulary, width, scale=2.0),
        draw(vocabulary) if bias else None,
        torch.randint(0, vocabulary, (count,), generator=generator),
        torch.rand(count, generator=generator, dtype=torch.float64).add(0.3).to(torch.float64),
    )


def whole(hidden, weight, bias, targets, temperatures):
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    distribution = (logits / temperatures.unsqueeze(1)).log_softmax(dim=1)
    entropy = -(distribution.exp() * distribution).sum(dim=1)
    return distribution.gather(1, targets.unsqueeze(1)).squeeze(1), entropy


@pytest.mark.parametrize("count", [1, 5, 8, 13])
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_autograd(count, chunk, bias):
    inputs = make(count, bias=bias)
    mine, theirs = linear_logprobs(*inputs, chunk), whole(*inputs)
    for left, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(left, right)
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(2)]
    leaves = [tensor for tensor in inputs[:3] if tensor is not None]
    for weights in (factors, (factors[0], None), (None, factors[1])):
        losses = [
            sum((values * factor).sum() for values, factor in zip(side, weights, strict=True) if factor is not None)
            for side in (mine, theirs)
        ]
        for left, right in zip(*(torch.autograd.grad(loss, leaves, retain_graph=True) for loss in losses), strict=True):
            torch.testing.assert_close(left, right)


def test_gradients_agree_with_finite_differences():
    hidden, weight, bias, targets, temperatures = make(5)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprobs(h, w, b, targets, temperatures, 2), (hidden, weight, bias)
    )


def test_nothing_is_computed_for_what_is_frozen():
    hidden, weight, _, targets, temperatures = make(5)
    logprobs, _ = linear_logprobs(hidden, weight.detach(), None, targets, temperatures, 2)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_many_chunks_in_bfloat16_add_up_in_float32():
    inputs = make(2000, width=32, vocabulary=64, bias=False, dtype=torch.bfloat16)
    weight, temperatures = inputs[1], inputs[4]
    # Factors of one sign, so that what each chunk would round away does not cancel.
    factor = torch.rand(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad((whole(*inputs)[0] * factor).sum(), weight)[0].double()
    errors = {}
    for chunk in (10, 2000):
        logprobs, _ = linear_logprobs(*inputs[:4], temperatures.float(), chunk)
        (gradient,) = torch.autograd.grad((logprobs * factor).sum(), weight)
        errors[chunk] = ((gradient.double() - wanted).norm() / wanted.norm()).item()
    # What is left is the rounding of the logits.
    assert errors[10] == pytest.approx(errors[2000], rel=0.05)


def test_logits_of_extreme_size_are_finite():
    hidden, weight, _, targets, temperatures = make(6, bias=False, dtype=torch.float32)
    values = linear_logprobs(hidden * 1e4, weight, None, targets, temperatures.float(), 4)
    wanted = whole(hidden * 1e4, weight, None, targets, temperatures)
    for mine, theirs in zip(values, wanted, strict=True):
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-2)
