"""A sample as text, for servers that take no messages."""

from __future__ import annotations

import re

import orjson

from services.reward.scorers.base import Item

_PLACEHOLDER = re.compile(r"\{(prompt|response|label)\}")


def filled(template: str, item: Item) -> str:
    """`template` with {prompt}, {response} and {label} replaced, all at once: what is put in is not looked at again."""
    values = {"prompt": prompt_text(item), "response": item.completion, "label": item.label}
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def prompt_text(item: Item) -> str:
    """The prompt; of chat messages a paragraph each, with the role before it."""
    if not item.messages_json:
        return item.prompt
    return "\n\n".join(_paragraph(message) for message in orjson.loads(item.messages_json))


def _paragraph(message: dict[str, object]) -> str:
    content = message.get("content") or ""
    text = content if isinstance(content, str) else orjson.dumps(content).decode()
    return f"{message.get('role', '')}: {text}"
