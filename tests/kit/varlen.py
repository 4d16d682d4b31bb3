"""torch's varlen kernel without a GPU."""

from __future__ import annotations

import math
from itertools import pairwise

import torch


def varlen_by_hand(
    query, key, value, starts, key_starts, longest, longest_keys, *, scale, window_size, enable_gqa=False
):
    """What the kernel gives, a sequence and a head at a time: the last query is the last key."""
    assert starts.dtype == key_starts.dtype == torch.int32
    assert (starts.diff().max(), key_starts.diff().max(), window_size[1]) == (longest, longest_keys, 0)
    group = query.shape[1] // key.shape[1]
    output = torch.empty_like(query)
    for (start, end), (first, last) in zip(pairwise(starts.tolist()), pairwise(key_starts.tolist()), strict=True):
        places = torch.arange(last - first)
        behind = places[start - end :, None] - places[None, :]
        seen = (behind >= 0) & ((behind <= window_size[0]) | (window_size[0] < 0))
        for head in range(query.shape[1]):
            q, k, v = query[start:end, head], key[first:last, head // group], value[first:last, head // group]
            scores = (q @ k.T * scale).masked_fill(~seen, -math.inf)
            output[start:end, head] = scores.softmax(dim=-1) @ v
    return output
