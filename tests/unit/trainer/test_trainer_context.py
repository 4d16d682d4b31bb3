"""What one of several ranks has of a packed row that they share, and what it attends to."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.backends.torch import attention
from services.trainer.backends.torch.logprobs import to_device
from services.trainer.batch.context import context_share
from services.trainer.batch.packing import PackItem, pack
from services.trainer.ranks.group import RankGroup
from tests.kit.varlen import varlen_by_hand

CPU = torch.device("cpu")
HEADS, KV_HEADS, WIDTH = 4, 2, 8


def item(rng, prompt, completion_length):
    tokens = np.concatenate([prompt, rng.integers(0, 100, completion_length)]).astype(np.int32)
    predict = np.arange(len(prompt) - 1, len(tokens) - 1)
    return PackItem(
        token_ids=tokens[:-1],
        prompt_length=len(prompt),
        predict=predict,
        targets=tokens[predict + 1],
        rollout_logprobs=np.zeros(len(predict), dtype=np.float32),
        fresh=np.ones(len(predict), dtype=np.bool_),
        weight=1.0,
        temperature=1.0,
        sample_row=0,
    )


@st.composite
def rows(draw):
    """Prompts of completions, of any length."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = st.lists(st.integers(1, 40), min_size=1, max_size=4)
    prompts = draw(st.lists(st.tuples(st.integers(1, 30), lengths), min_size=1, max_size=3))
    items = [
        item(rng, prompt, length)
        for size, completions in prompts
        for prompt in [rng.integers(0, 100, size)]
        for length in completions
    ]
    return pack(draw(st.permutations(items)))


def shares(batch, ranks):
    return [context_share(batch, ranks, rank) for rank in range(ranks)]


def owned(batch, ranks):
    """For each rank which of the row's tokens it has: told by ids that are all different."""
    row = replace(batch, token_ids=np.arange(1, len(batch.token_ids) + 1))
    return [share.token_ids[share.token_ids > 0] - 1 for share in shares(row, ranks)]


@settings(max_examples=30, deadline=None)
@given(rows(), st.integers(2, 5))
def test_each_token_is_of_one_rank_and_ranks_have_as_many(batch, ranks):
    tokens = owned(batch, ranks)
    assert sorted(np.concatenate(tokens)) == list(range(len(batch.token_ids)))
    assert max(map(len, tokens)) - min(map(len, tokens)) <= 1
    found = shares(batch, ranks)
    (each,) = {len(share.token_ids) for share in found}
    assert each == -(-len(batch.token_ids) // ranks)
    together = [np.concatenate([getattr(share, name) for share in found]) for name in ("targets", "temperatures")]
    for whole, wanted in zip(together, (batch.targets, batch.temperatures), strict=True):
        np.testing.assert_array_equal(whole[found[0].order], wanted)
    for share, own in zip(found, tokens, strict=True):
        np.testing.assert_array_equal(share.token_ids[: len(own)], batch.token_ids[own])
        np.testing.assert_array_equal(share.position_ids[: len(own)], batch.position_ids[own])
        members = sorted(zip(own[share.member_tokens], share.member_sequences, strict=True))
        sequences = np.repeat(np.arange(len(batch.lengths)), batch.lengths)
        of_row = sorted(zip(batch.order, sequences, strict=True))
        assert members == [pair for pair in of_row if pair[0] in set(own.tolist())]


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("window", [None, 7])
@settings(max_examples=10, deadline=None)
@given(rows(), st.integers(2, 4))
def test_ranks_attend_to_what_one_does(kernel, window, batch, ranks):
    generator = torch.Generator().manual_seed(len(batch.token_ids))
    query, key, value = (
        torch.randn(len(batch.token_ids), heads, WIDTH, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    whole = to_device(batch, CPU).layout
    wanted = attention._blockwise(query, key, value, whole, 0.3, window)
    tokens = owned(batch, ranks)
    each = -(-len(batch.token_ids) // ranks)

    def of(rank, rows):
        own = torch.zeros(each, *rows.shape[1:], dtype=rows.dtype)
        own[: len(tokens[rank])] = rows[tokens[rank]]
        return own

    keys, values = (torch.cat([of(rank, rows) for rank in range(ranks)]) for rows in (key, value))
    for rank in range(ranks):
        group = RankGroup(rank, ranks, context=object(), context_size=ranks)
        varlen = to_device(batch, CPU, group).layout.varlen
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "_has_kernel", lambda *_: kernel)
            patch.setattr(attention, "varlen_attn", varlen_by_hand)
            found = attention._varlen(of(rank, query), keys, values, varlen, 0.3, window)
        torch.testing.assert_close(found[: len(tokens[rank])], wanted[tokens[rank]])


def test_ranks_have_as_much_attention_to_compute():
    rng = np.random.default_rng(0)
    batch = pack([item(rng, rng.integers(0, 100, 200), 4000), item(rng, rng.integers(0, 100, 100), 900)])
    for ranks in (2, 4, 8):
        pairs = []
        for share in shares(batch, ranks):
            queries, keys = share.query_lengths.astype(float), share.key_lengths.astype(float)
            pairs.append((queries * (keys - queries) + queries * (queries + 1) / 2).sum())
        assert max(pairs) / np.mean(pairs) < 1.005
