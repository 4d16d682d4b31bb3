"""Losses as the papers write them: one token and one sequence at a time, in float64, for comparison.

Nothing here calls the trainer. A token is a dict of float64 scalars: new (with gradient), entropy (with gradient), old,
rollout, ref, advantage, and the factor of its policy loss. Log-ratios are limited to ±20, as the trainer documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

Token = dict[str, Any]


def ratio_of(log_ratio: Any) -> Any:
    return torch.exp(torch.clamp(torch.as_tensor(log_ratio, dtype=torch.float64), -20.0, 20.0))


def settings_of(algorithm: Any, constant: float) -> dict[str, Any]:
    """What a configuration says, under names of our own."""
    correction = algorithm.correction
    return {
        "kind": algorithm.policy_loss,
        "low": algorithm.eps_clip,
        "high": algorithm.eps_clip_high or algorithm.eps_clip,
        "dual": algorithm.eps_clip_c,
        "weights": correction.weights,
        "level": correction.level,
        "w_low": correction.low,
        "w_high": correction.high,
        "reject": correction.reject,
        "r_low": correction.reject_low,
        "r_high": correction.reject_high,
        "veto": correction.veto,
        "delta": algorithm.opsm_delta,
        "kl_coef": algorithm.kl_loss_coef,
        "kl": algorithm.kl_type,
        "unbiased": algorithm.kl_unbiased,
        "entropy_coef": algorithm.entropy_coef,
        "constant": constant,
    }


def number(value: Any) -> float:
    """Without its gradient."""
    return float(value.detach()) if isinstance(value, torch.Tensor) else float(value)


def difference(new: Any, old: Any) -> Any:
    """0 where a token is impossible under both."""
    return torch.zeros((), dtype=torch.float64) if new == old == -math.inf else new - old


def ppo(ratio: Any, advantage: float, low: float, high: float, dual: float | None) -> Any:
    """The negative of min(r A, clip(r) A), and for A < 0 of max(that, c A)."""
    clipped = min(max(number(ratio), 1 - low), 1 + high)
    unclipped = ratio * advantage
    gain = (
        unclipped
        if number(unclipped) <= clipped * advantage
        else torch.tensor(clipped * advantage, dtype=torch.float64)
    )
    if dual is not None and advantage < 0 and number(gain) < dual * advantage:
        gain = torch.tensor(dual * advantage, dtype=torch.float64)
    return -gain


def policy_loss(sequence: Sequence[Token], index: int, settings: dict[str, Any]) -> Any:
    token, low, high = sequence[index], settings["low"], settings["high"]
    if settings["kind"] == "sft":
        return -token["new"]
    if settings["kind"] == "gspo":
        terms = [difference(each["new"], each["old"]) for each in sequence]
        return ppo(ratio_of(sum(terms) / len(terms)), token["advantage"], low, high, settings["dual"])
    ratio = ratio_of(difference(token["new"], token["old"]))
    if settings["kind"] == "cispo":
        weight = min(max(number(ratio), 1 - low), 1 + high)
        return -weight * token["advantage"] * token["new"]
    return ppo(ratio, token["advantage"], low, high, settings["dual"])


def kl(kind: str, new: Any, ref: float) -> Any:
    """Schulman's estimators of KL(new || ref)."""
    x = difference(new, torch.tensor(ref, dtype=torch.float64))
    if kind == "k1":
        return x
    if kind == "k2":
        return x * x / 2
    y = torch.clamp(-x, max=20.0)
    k3 = torch.exp(y) - 1 - y
    return torch.clamp(k3, -10.0, 10.0) if kind == "low_var_kl" else k3


def correction_ratio(sequence: Sequence[Token], index: int, level: str) -> float:
    """Of old to rollout: the token's, or the product or the geometric mean over its sequence."""
    terms = [number(difference(each["old"], each["rollout"])) for each in sequence]
    if level == "token":
        return number(ratio_of(terms[index]))
    total = math.fsum(terms)
    return number(ratio_of(total if level == "sequence" else total / len(terms)))


def weight_of(sequence: Sequence[Token], index: int, settings: dict[str, Any]) -> float:
    ratio = correction_ratio(sequence, index, settings["level"])
    if settings["weights"] == "clip":
        return min(max(ratio, settings["w_low"]), settings["w_high"])
    if settings["weights"] == "mask":
        return ratio if settings["w_low"] <= ratio <= settings["w_high"] else 0.0
    return 1.0


def is_rejected(sequence: Sequence[Token], index: int, settings: dict[str, Any]) -> bool:
    if settings["reject"] != "none":
        ratio = correction_ratio(sequence, index, settings["reject"])
        if not settings["r_low"] <= ratio <= settings["r_high"]:
            return True
    for each in sequence:
        if math.exp(min(number(difference(each["old"], each["rollout"])), 700.0)) < settings["veto"]:
            return True
    if settings["delta"] is None or sequence[index]["advantage"] >= 0:
        return False
    divergence = math.fsum(number(difference(each["old"], each["new"])) for each in sequence) / len(sequence)
    return divergence > settings["delta"]


def token_loss(sequence: Sequence[Token], index: int, settings: dict[str, Any]) -> Any:
    token = sequence[index]
    if is_rejected(sequence, index, settings):
        return torch.zeros((), dtype=torch.float64)
    loss = token["factor"] * weight_of(sequence, index, settings) * policy_loss(sequence, index, settings)
    if settings["kl_coef"]:
        divergence = kl(settings["kl"], token["new"], token["ref"])
        if settings["unbiased"]:
            divergence = divergence * ratio_of(difference(token["new"], token["rollout"]))
        loss = loss + settings["kl_coef"] * divergence
    return loss - settings["entropy_coef"] * token["entropy"]


def batch_loss(samples: Sequence[Sequence[Sequence[Token]]], reduction: str, settings: dict[str, Any]) -> Any:
    """`samples` are lists of sequences, of which any may be empty."""
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        of_sample = torch.zeros((), dtype=torch.float64)
        for sequence in sample:
            for index in range(len(sequence)):
                of_sample = of_sample + token_loss(sequence, index, settings)
        length = sum(len(sequence) for sequence in sample)
        total = total + (of_sample / max(length, 1) if reduction == "per_sample" else of_sample)
    tokens = sum(len(sequence) for sample in samples for sequence in sample)
    if reduction == "per_token":
        return total / max(tokens, 1)
    return total / len(samples) / (settings["constant"] if reduction == "constant" else 1)
