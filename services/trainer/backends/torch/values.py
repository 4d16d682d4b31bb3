"""Values of the states of a packed row: a language model's body under a scalar head."""

from __future__ import annotations

from typing import Any

import torch

from services.trainer.backends.torch.context import tokens_of_all
from services.trainer.backends.torch.logprobs import DeviceBatch, predicting_states
from services.trainer.backends.torch.sharding import Root

HEAD = "value_head"


class ValueModel(torch.nn.Module):
    """Parameters are ``base_model.<name>`` and ``value_head.<name>``. The head is float32, and 0: without training all
    values are 0.
    """

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.base_model = body
        self._no_split_modules = getattr(body, "_no_split_modules", None)
        width = body.config.get_text_config().hidden_size
        # Without random numbers: a critic does not change what else depends on the seed.
        self.value_head = torch.nn.utils.skip_init(torch.nn.Linear, width, 1, dtype=torch.float32)
        for parameter in self.value_head.parameters():
            torch.nn.init.zeros_(parameter)

    def get_input_embeddings(self) -> torch.nn.Module:
        embeddings: torch.nn.Module = self.base_model.get_input_embeddings()
        return embeddings

    def set_attn_implementation(self, name: str) -> None:
        self.base_model.set_attn_implementation(name)


def token_values(model: Any, batch: DeviceBatch) -> torch.Tensor:
    """float32[n]: of the state before each trained token, which is where the token is predicted."""
    values: torch.Tensor = model.value_head(predicting_states(model, batch).float()).squeeze(1)
    return values


def all_values(root: Root, batch: DeviceBatch) -> torch.Tensor:
    """`token_values` of all the row's trained tokens, also where ranks share it."""
    own: torch.Tensor = root.run(token_values, batch)
    context = batch.layout.context
    return own if context is None or not len(context.order) else tokens_of_all(own, context)
