"""A coin toss: for trying a run out without a judge."""

from __future__ import annotations

from hashlib import blake2b

from services.reward.scorers.base import Item, Verdict


def score(item: Item) -> Verdict:
    """0 or 1 with equal chance, by the sample's id alone: scored again, it is the same."""
    return Verdict(float(blake2b(item.sample_id.encode(errors="surrogatepass"), digest_size=1).digest()[0] & 1), {})
