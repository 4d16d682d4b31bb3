"""Log-probabilities straight from hidden states, with the logits of one chunk of tokens in memory at a time.

The gradient of a policy loss is known only when all log-probs are, so that it cannot be taken on the way (as fused
linear cross-entropies do): the backward pass computes each chunk's logits once more, turns them into their gradient,
and adds up that of the weight in float32. On a GPU a kernel goes over the logits of a chunk once each way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from services.trainer.backends.torch.precision import HALF


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperatures: torch.Tensor,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of tokens `targets` int64[n] under softmax((hidden weight^T + bias) / temperatures), and its entropy: [n] each.

    `hidden` is [n, width], `weight` [vocabulary, width]. Computed, and given, in float32 (float64 for float64 inputs),
    `chunk` tokens at a time. The gradient reaches hidden, weight and bias, from log-probs and entropy.
    """
    logprobs, entropy = _LinearLogprobs.apply(hidden, weight, bias, targets, temperatures, chunk)
    return logprobs, entropy


class _Figures(NamedTuple):
    """Of each token's distribution [n]."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    normalizer: torch.Tensor
    """log Σ exp(logit / temperature)."""


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperatures: torch.Tensor,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        parts = []
        for h, t, temperature in zip(*(each.split(chunk) for each in (hidden, targets, temperatures)), strict=True):
            parts.append(_figures(_logits(h, weight, bias), t, temperature))
        logprobs, entropy, normalizer = (torch.cat(each) for each in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, targets, temperatures, normalizer, entropy)
        ctx.chunk = chunk
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, *per_token = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(per_token[-1])
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=per_token[-1].dtype) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=per_token[-1].dtype) if wanted[2] else None
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            targets, temperatures, normalizer, entropy = (tensor[part] for tensor in per_token)
            grad = _gradient(
                _logits(hidden[part], weight, bias),
                *(targets, temperatures, normalizer, entropy, grad_logprobs[part]),
                None if grad_entropy is None else grad_entropy[part].contiguous(),
                weight.dtype if grad_bias is None else grad_bias.dtype,
            )
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
                grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, grad.t(), hidden[part])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None, None, None),
        )


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[chunk, vocabulary], of its own memory."""
    logits = _wide_product(hidden, weight)
    return logits if bias is None else logits.add_(bias)


def _figures(logits: torch.Tensor, targets: torch.Tensor, temperatures: torch.Tensor) -> _Figures:
    """Uses up `logits`."""
    if _has_kernel(logits):
        from services.trainer.backends.torch.linear_logprobs_kernel import row_figures

        return _Figures(*row_figures(logits, targets, temperatures))
    logits.div_(temperatures.unsqueeze(1))
    largest = logits.amax(dim=1)
    shifted = logits.sub_(largest.unsqueeze(1))
    chosen = shifted.gather(1, targets.unsqueeze(1)).squeeze(1)
    powers = shifted.exp()
    total = powers.sum(dim=1)
    mean = powers.mul_(shifted).sum(dim=1) / total
    log_total = total.log()
    return _Figures(chosen - log_total, log_total - mean, largest + log_total)


def _gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperatures: torch.Tensor,
    normalizer: torch.Tensor,
    entropy: torch.Tensor,
    of_logprobs: torch.Tensor,
    of_entropy: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Of the logits [chunk, vocabulary], in `dtype`, from those of log-probs and entropies. Uses up `logits`."""
    if _has_kernel(logits):
        from services.trainer.backends.torch.linear_logprobs_kernel import logit_gradient

        return logit_gradient(
            *(logits, targets, temperatures, normalizer, entropy), of_logprobs.contiguous(), of_entropy, dtype
        )
    logits.div_(temperatures.unsqueeze(1)).sub_(normalizer.unsqueeze(1))
    grad = logits.exp()
    if of_entropy is None:
        grad.mul_(-of_logprobs.unsqueeze(1))
    else:
        factor = logits.add_(entropy.unsqueeze(1)).mul_(-of_entropy.unsqueeze(1))
        grad.mul_(factor.sub_(of_logprobs.unsqueeze(1)))
    del logits
    grad.scatter_add_(1, targets.unsqueeze(1), of_logprobs.unsqueeze(1)).div_(temperatures.unsqueeze(1))
    return grad.to(dtype)


def _has_kernel(logits: torch.Tensor) -> bool:
    return logits.is_cuda and logits.dtype == torch.float32


def _wide_product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``hidden @ weight.T``, of half precision without rounding it to that again."""
    if hidden.dtype not in HALF:
        return hidden @ weight.t()
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return hidden.float() @ weight.float().t()


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left @ right`` without rounding the product to the dtype of its factors first."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
