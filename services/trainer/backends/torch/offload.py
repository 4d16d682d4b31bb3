"""What the trainer keeps on a GPU, moved to pinned host memory while engines have that GPU, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count

import torch


class Offload:
    """Parameters, buffers and optimizer state change place under their names: who holds a tensor holds it still.

    The host copies are kept for the next time, since pinning memory takes longer than filling it. Off a GPU nothing
    moves.
    """

    def __init__(
        self, model: torch.nn.Module, others: Callable[[], Iterable[torch.Tensor]], device: torch.device
    ) -> None:
        """`others`: tensors that are none of the model's, master copies and optimizer state; there may be more of them
        each time. A distributed tensor is moved by its local part.
        """
        self._model = model
        self._others = others
        self._device = device
        self._host: dict[int, torch.Tensor] = {}
        self._asleep = False

    @property
    def asleep(self) -> bool:
        return self._asleep

    def sleep(self) -> None:
        """Returns when the GPU memory is free. Gradients are dropped."""
        if self._asleep:
            return
        self._model.zero_grad(set_to_none=True)
        if self._device.type == "cuda":
            number = count()
            self._move(lambda tensor: self._to_host(tensor, number))
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
        self._asleep = True

    def wake(self) -> None:
        """Returns when everything is back, or on its way on the current stream. Raises torch.OutOfMemoryError."""
        if not self._asleep:
            return
        if self._device.type == "cuda":
            self._move(lambda tensor: tensor.to(self._device, non_blocking=True))
        self._asleep = False

    def _move(self, place: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for tensor in chain(self._model.parameters(), self._model.buffers(), self._others()):
            local = getattr(tensor, "_local_tensor", tensor)
            local.grad = None
            local.data = place(local.data)

    def _to_host(self, tensor: torch.Tensor, number: Iterator[int]) -> torch.Tensor:
        """Tensors are moved in the same order each time: the `number`s of their host copies."""
        if tensor.device.type != "cuda":
            return tensor
        place = next(number)
        known = self._host.get(place)
        if known is None or (known.shape, known.dtype) != (tensor.shape, tensor.dtype):
            known = self._host[place] = torch.empty_like(tensor, device="cpu", pin_memory=True)
        known.copy_(tensor, non_blocking=True)
        return known
