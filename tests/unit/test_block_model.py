"""A model padded to whole fp8 blocks is the same function."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from services.common.model_files import BLOCK
from tests.gpu.block_model import padded


def test_the_padded_model_gives_the_same_logits() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    wide = padded(model)
    for name, parameter in wide.named_parameters():
        if "proj.weight" in name:
            assert all(size % BLOCK == 0 for size in parameter.shape), name
    token_ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(wide(token_ids).logits, model(token_ids).logits)
    wide(token_ids).logits.square().sum().backward()
    assert all(
        not parameter.grad[parameter == 0].any() for name, parameter in wide.named_parameters() if "proj.weight" in name
    )
