"""What is asked of each kind of HTTP server, and how its answer is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from services.common.config.remote import RemoteConfig
from services.common.errors import ConfigError
from services.common.wire import decode_tokens
from services.reward.remote.http_client import HttpSession
from services.reward.remote.outcomes import Answer, BadAnswerError
from services.reward.remote.texts import filled
from services.reward.scorers.base import Item, SampleError, Verdict, finite, to_verdict

# Of a judge's answer, this much of its end is searched.
_JUDGE_CHARS = 16_384


class RemoteRm:
    """slime's remote_rm: a sample a call, answered by a number or an object with "score" or "reward"."""

    batch_size = 1

    def __init__(self, config: RemoteConfig, url: str) -> None:
        self._http, self._url = HttpSession(config), url
        self.start, self.close = self._http.start, self._http.close

    async def score(self, items: Sequence[Item]) -> Sequence[Answer]:
        [item] = items
        answer = await self._http.post(self._url, _contract(item))
        try:
            return [to_verdict(answer)]
        except SampleError as error:
            raise BadAnswerError(str(error)) from None


def _contract(item: Item) -> dict[str, Any]:
    prompt = orjson.loads(item.messages_json) if item.messages_json else item.prompt
    return {"prompt": prompt, "response": item.completion, "label": item.label or None}


class Judge:
    """A language model behind OpenAI's chat completions, asked for a number in words."""

    batch_size = 1

    def __init__(self, config: RemoteConfig, url: str) -> None:
        """Raises ConfigError for a prompt file that cannot be read."""
        self._http, self._url = HttpSession(config), f"{url.rstrip('/')}/chat/completions"
        self.start, self.close = self._http.start, self._http.close
        self._judge = config.judge
        self._pattern = re.compile(config.judge.pattern)
        self._prompt = config.judge.prompt
        if config.judge.prompt_file is not None:
            self._prompt = _read(config.judge.prompt_file)

    async def score(self, items: Sequence[Item]) -> Sequence[Answer]:
        [item] = items
        messages = [{"role": "user", "content": filled(self._prompt, item)}]
        if self._judge.system:
            messages.insert(0, {"role": "system", "content": self._judge.system})
        answer = await self._http.post(
            self._url, {**self._judge.body, "model": self._judge.model, "messages": messages, "stream": False}
        )
        try:
            said = answer["choices"][0]["message"]["content"]
        except (TypeError, LookupError):
            raise BadAnswerError("the answer is no chat completion") from None
        if not isinstance(said, str):
            raise BadAnswerError("the judge said nothing")
        return [Verdict(self._number(said[-_JUDGE_CHARS:]), {})]

    def _number(self, said: str) -> float:
        """The last match. Raises BadAnswerError for what is no number within the bounds."""
        found = self._pattern.findall(said)
        end = " ".join(said[-80:].split())
        if not found:
            raise BadAnswerError(f"the judge gave no score: ...{end!r}")
        try:
            number = float(found[-1])
        except ValueError:
            raise BadAnswerError(f"the judge's score {found[-1]!r:.40} is no number") from None
        if not self._judge.low <= number <= self._judge.high:
            bounds = f"{self._judge.low:g} to {self._judge.high:g}"
            raise BadAnswerError(f"the judge's score {number:g} is not within {bounds}")
        return number


class Classify:
    """A Hugging Face sequence-classification model in an SGLang engine; one of its logits is the reward."""

    def __init__(self, config: RemoteConfig, url: str) -> None:
        self._http, self._url = HttpSession(config), f"{url.rstrip('/')}/classify"
        self.start, self.close = self._http.start, self._http.close
        self._classify = config.classify
        self.batch_size = config.batch_size

    async def score(self, items: Sequence[Item]) -> Sequence[Answer]:
        # One call takes either all as token ids or all as text.
        tokens = self._classify.input == "tokens"
        answers: dict[int, Answer] = {}
        for with_tokens in (True, False):
            places = [at for at, each in enumerate(items) if bool(tokens and each.token_ids) is with_tokens]
            if places:
                found = await self._call([items[at] for at in places], with_tokens=with_tokens)
                answers |= zip(places, found, strict=True)
        return [answers[at] for at in range(len(items))]

    async def _call(self, items: Sequence[Item], *, with_tokens: bool) -> list[Answer]:
        if with_tokens:
            body: dict[str, Any] = {"input_ids": [decode_tokens(each.token_ids).tolist() for each in items]}
        else:
            body = {"text": [filled(self._classify.text, each) for each in items]}
        answers = await self._http.post(self._url, body)
        if not isinstance(answers, list) or len(answers) != len(items):
            raise BadAnswerError(f"the answer is no list of {len(items)}")
        return [self._logit(answer) for answer in answers]

    def _logit(self, answer: Any) -> Answer:
        logits = answer.get("embedding") if isinstance(answer, dict) else None
        if not isinstance(logits, list) or len(logits) <= self._classify.label:
            return BadAnswerError(f'the answer has no "embedding" with a logit {self._classify.label}')
        try:
            return Verdict(finite(logits[self._classify.label], "the logit"), {})
        except SampleError as error:
            return BadAnswerError(str(error))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", field="reward.remote.judge.prompt_file") from error
