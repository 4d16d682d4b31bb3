"""Models whose greedy answer to one prompt names them, and the judge of answers: Hugging Face's own forward pass.

Each token of an answer has to be what the weights of its version say next, given the tokens before it. The KV cache
under it may be carried over a push, or computed anew (a request that is resumed elsewhere), always by whole versions.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from services.rollout.engines.torch_engine.checkpoint import load_checkpoint
from services.rollout.engines.torch_engine.decoder_config import read_config
from services.rollout.engines.torch_engine.parameters import Parameters
from tests.kit.hf_reference import load_reference
from tests.kit.tiny_model import EOS_ID, build_tiny_qwen3

PROMPT = "which weights are these?"
# Tokens of an answer that is asked of an engine, and of one that goes through a replica.
SHORT, LONG = 6, 24
# With two layers 1.6 MB: two buckets of at most 1 MiB.
SHAPE = {"intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
# Two implementations that differ in their last bits agree on the largest logit if it is larger by so much.
MARGIN = 0.02
_TIE = 1e-3


@dataclass(frozen=True)
class Turn:
    """Answer tokens [start, end) by the weights of one model."""

    model: int
    start: int
    end: int


class Models:
    """`count` of them, in ``directory/0``, ``directory/1``, ..."""

    def __init__(self, directory: Path, count: int, layers: int = 2) -> None:
        self.directory = directory
        self._references: list[PreTrainedModel] = []
        self.answers: list[list[int]] = []
        """What each says, LONG tokens."""
        seed = 0
        while len(self.answers) < count:
            place = directory / str(len(self.answers))
            build_tiny_qwen3(place, seed=seed, hidden=128, layers=layers, **SHAPE)
            seed += 1
            if not self.answers:
                tokenizer = PreTrainedTokenizerFast.from_pretrained(place)
                self.prompt: list[int] = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
            reference = load_reference(place)
            if (answer := self._clear_answer(reference)) is not None:
                self._references.append(reference)
                self.answers.append(answer)

    @property
    def paths(self) -> list[Path]:
        return [self.directory / str(number) for number in range(len(self.answers))]

    def checksums(self) -> list[str]:
        """Of the weights of an in-house engine that loaded each one's directory."""
        sums = []
        for path in self.paths:
            parameters = Parameters(read_config(path), torch.float32, torch.device("cpu"))
            load_checkpoint(path, parameters)
            parts = parameters.checksums()
            sums.append(hashlib.sha256("".join(f"{name}{parts[name]}" for name in sorted(parts)).encode()).hexdigest())
        return sums

    def whole(self, answer: Sequence[int], model: int) -> bool:
        """Whether the answer is that of one model."""
        return list(answer) == self.answers[model][: len(answer)]

    def explained(self, answer: Sequence[int], turns: Sequence[Turn]) -> bool:
        """Whether each token is its model's, over some cache of whole models."""
        assert turns[-1].end == len(answer), "every token has its turn"
        # Nearly always it is one request that was carried from model to model: that is quickly seen.
        return self._carried(answer, turns) or self._by_any_caches(answer, turns)

    @torch.no_grad()
    def _carried(self, answer: Sequence[int], turns: Sequence[Turn]) -> bool:
        ids, before = torch.tensor([[*self.prompt, *answer]]), len(self.prompt) - 1
        cache, fed = DynamicCache(), 0
        for turn in turns:
            if turn.start == turn.end > 0:
                continue
            first, last = before + turn.start, before + turn.end
            logits = self._references[turn.model](ids[:, fed:last], past_key_values=cache).logits[0, first - fed :]
            said = logits.gather(1, ids[0, first + 1 : last + 1, None]).squeeze(1)
            if bool((said < logits.max(1).values - _TIE).any()):
                return False
            fed = last
        return True

    def _by_any_caches(self, answer: Sequence[int], turns: Sequence[Turn]) -> bool:
        at = [turn.model for turn in turns for _ in range(turn.start, turn.end)]
        ids = torch.tensor([[*self.prompt, *answer]])
        first = len(self.prompt) - 1
        # The prompt may have been computed before the push that the first token is of.
        caches = [self._fed(model, ids[:, :first]) for model in range(len(self._references))]
        for number, token in enumerate(answer):
            agreeing = []
            # A request that is resumed begins with a cache of its own.
            for cache in [*caches, DynamicCache()]:
                fed = cache.get_seq_length()
                if self._says(at[number], ids[:, fed : first + number + 1], cache, token):
                    agreeing.append(cache)
            caches = agreeing
            if not caches:
                return False
        return True

    def turned_once(self, answer: Sequence[int], old: int, new: int) -> bool:
        """Whether it is `old`'s up to some token, and `new`'s from there on."""
        end = len(answer)
        return any(self._carried(answer, [Turn(old, 0, at), Turn(new, at, end)]) for at in range(end + 1))

    def names(self) -> list[str]:
        """Of the tensors, in the order in which they are pushed."""
        return [name for name, _ in self._references[0].named_parameters()]

    def torn(self, old: int, new: int, tensors: Sequence[str]) -> list[int]:
        """What `old` says with some tensors of `new`."""
        mixed = copy.deepcopy(self._references[old])
        state = self._references[new].state_dict()
        mixed.load_state_dict({name: state[name] for name in tensors}, strict=False)
        return [token for token, _ in self._greedy(mixed, SHORT)]

    @torch.no_grad()
    def continued(self, begun: Sequence[int], *, old: int | None, new: int, length: int) -> list[int]:
        """What `new` makes of an answer that was begun: on the cache of `old`, or on one of its own."""
        cache, ids = DynamicCache(), torch.tensor([[*self.prompt, *begun]])
        if old is not None:
            self._references[old](ids[:, :-1], past_key_values=cache)
            ids = ids[:, -1:]
        answer = list(begun)
        while len(answer) < length:
            best = self._references[new](ids, past_key_values=cache).logits[0, -1].argmax()
            answer.append(int(best))
            ids = best[None, None]
        return answer

    def _clear_answer(self, reference: PreTrainedModel) -> list[int] | None:
        """None when rounding could decide a token, when it ends early, or begins like that of another model."""
        drawn = list(self._greedy(reference, LONG))
        answer = [token for token, _ in drawn]
        known = {tuple(other[:2]) for other in self.answers}
        if min(lead for _, lead in drawn) < MARGIN or EOS_ID in answer or tuple(answer[:2]) in known:
            return None
        return answer

    @torch.no_grad()
    def _greedy(self, reference: PreTrainedModel, length: int) -> Iterator[tuple[int, float]]:
        """Tokens, and by how much each one's logit is above the next best."""
        cache, ids = DynamicCache(), torch.tensor([self.prompt])
        for _ in range(length):
            best = reference(ids, past_key_values=cache).logits[0, -1].topk(2)
            yield int(best.indices[0]), float(best.values[0] - best.values[1])
            ids = best.indices[:1][None]

    @torch.no_grad()
    def _fed(self, model: int, ids: torch.Tensor) -> Any:
        cache = DynamicCache()
        self._references[model](ids, past_key_values=cache)
        return cache

    @torch.no_grad()
    def _says(self, model: int, ids: torch.Tensor, cache: Any, token: int) -> bool:
        """Feeds `ids` into the cache; whether `token` comes next."""
        logits = self._references[model](ids, past_key_values=cache).logits[0, -1]
        return bool(logits[token] >= logits.max() - _TIE)
