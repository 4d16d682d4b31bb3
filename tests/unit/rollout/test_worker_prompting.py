"""Text to token ids and back, by the run's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from polyhead.v1 import sample_pb2
from services.common.config import Config
from services.common.errors import ConfigError, InvalidArgumentError, LimitError
from services.rollout.prompting import Prompter, sampling_seed
from tests.kit.rollout_rig import changed

EOS = 2


def templated(base_config: Config, **data: object) -> Prompter:
    tree = base_config.model_dump()
    tree["data"] |= {"apply_chat_template": True, **data}
    return Prompter(Config.model_validate(tree))


def text_of(prompter: Prompter, prompt: sample_pb2.Prompt) -> str:
    return prompter.decode([prompter.encode(prompt, None)])[0]


def test_plain_text_is_tokenised_as_it_is(prompter):
    assert text_of(prompter, sample_pb2.Prompt(text="3+4=")) == "3+4="


def test_messages_and_text_go_through_the_chat_template(base_config):
    prompter = templated(base_config)
    assert text_of(prompter, sample_pb2.Prompt(text="hi")) == "user: hi\nassistant: "
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    prompt = sample_pb2.Prompt(messages_json=json.dumps(messages))
    assert text_of(prompter, prompt) == "system: a\nuser: b\nassistant: "


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (sample_pb2.Prompt(messages_json="{"), "prompt.messages_json: not JSON"),
        (sample_pb2.Prompt(messages_json="{}"), "prompt.messages_json: not a JSON list"),
        (sample_pb2.Prompt(text="a", tools_json="1"), "prompt.tools_json: not a JSON list"),
        (sample_pb2.Prompt(messages_json="[1]"), "prompt"),
    ],
)
def test_what_cannot_be_rendered_names_the_field(base_config, prompt, field):
    with pytest.raises(InvalidArgumentError, match=field):
        templated(base_config).encode(prompt, None)


def test_an_empty_prompt_is_refused(prompter):
    with pytest.raises(InvalidArgumentError, match="no tokens"):
        prompter.encode(sample_pb2.Prompt(text=""), None)


def test_a_prompt_must_leave_room_in_the_context(prompter):
    assert len(prompter.encode(sample_pb2.Prompt(text="1234"), 5)) == 4
    with pytest.raises(LimitError, match="no room in a context of 4"):
        prompter.encode(sample_pb2.Prompt(text="1234"), 4)
    assert prompter.token_limit(4, 6) == 2
    assert prompter.token_limit(4, None) == 10


def test_where_a_completion_ends(base_config):
    prompter = Prompter(changed(base_config, sampling={"stop": ["ab"], "stop_token_ids": [50]}))
    a, b, c = prompter.encode(sample_pb2.Prompt(text="abc"), None)
    unspecified, stop, length = (
        sample_pb2.FINISH_REASON_UNSPECIFIED,
        sample_pb2.FINISH_REASON_STOP,
        sample_pb2.FINISH_REASON_LENGTH,
    )
    assert prompter.ended([], 5) == unspecified
    assert prompter.ended([a], 5) == unspecified
    assert prompter.ended([c, EOS], 5) == stop
    assert prompter.ended([c, 50], 5) == stop
    assert prompter.ended([c, a, b], 5) == stop
    assert prompter.ended([c, c, c], 3) == length
    assert prompter.stop_end([c, a, b, c], 2) == 3
    assert prompter.stop_end([c, a, b, c], 3) is None or prompter.stop_end([c, a, b, c], 3) == 4
    assert prompter.stop_end([c, c], 0) is None


def test_seeds_differ_in_each_of_their_parts_and_fit_63_bits():
    seeds = {sampling_seed(run, ordinal, index) for run in range(4) for ordinal in range(16) for index in range(8)}
    assert len(seeds) == 4 * 16 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sampling_seed(1, 2, 3) == sampling_seed(1, 2, 3)


def test_a_missing_directory_is_one_clear_error(base_config, tmp_path):
    tree = base_config.model_dump()
    tree["model"]["hf_checkpoint"] = tmp_path / "none"
    with pytest.raises(ConfigError, match=r"model.hf_checkpoint: .*none has no usable tokenizer"):
        Prompter(Config.model_validate(tree))


def test_a_tokenizer_of_another_model_is_refused(base_config, tiny_model, tmp_path):
    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(model | {"vocab_size": 50}))
    tree = base_config.model_dump()
    tree["model"]["hf_checkpoint"] = tmp_path
    with pytest.raises(ConfigError, match=r"token ids up to \d+, but the model's vocab_size is 50"):
        Prompter(Config.model_validate(tree))


def test_a_template_is_needed_when_it_is_asked_for(base_config, tiny_model, tmp_path):
    for path in tiny_model.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    tree = base_config.model_dump()
    tree["model"]["hf_checkpoint"], tree["data"]["apply_chat_template"] = tmp_path, True
    with pytest.raises(ConfigError, match=r"data.apply_chat_template: .* no chat template"):
        Prompter(Config.model_validate(tree))


# --- stop strings over the seam between what was restored and what is new ---------------------------------------------


@given(
    text=st.text("ab ", min_size=1, max_size=30),
    stops=st.lists(st.text("ab ", min_size=1, max_size=5), min_size=1, max_size=3),
    seam=st.integers(0, 29),
)
def test_a_stop_string_ends_a_completion_wherever_the_seam_is(character_prompter, text, stops, seam):
    prompter = character_prompter(stops)
    ends = [at + len(stop) for stop in stops for at in range(len(text)) if text.startswith(stop, at)]
    assume(not any(end <= seam for end in ends))  # it would have ended there
    token_ids = prompter.encode(sample_pb2.Prompt(text=text), None)
    assert prompter.stop_end(token_ids, seam) == min(ends, default=None)


@pytest.fixture(scope="module")
def character_prompter(base_config):
    prompter = Prompter(base_config)

    def with_stops(stops: list[str]) -> Prompter:
        prompter._sampling = prompter._sampling.model_copy(update={"stop": stops})
        return prompter

    return with_stops


def bpe_prompter(base_config: Config, directory: Path, tokenizer: Tokenizer, stops: list[str]) -> Prompter:
    """A prompter over this tokenizer; its model is big enough for it."""
    source = base_config.model.hf_checkpoint
    (directory / "config.json").write_text(
        json.dumps(json.loads((source / "config.json").read_text()) | {"vocab_size": 1000})
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    tree = base_config.model_dump()
    tree["model"]["hf_checkpoint"], tree["rollout"]["sampling"]["stop"] = directory, stops
    return Prompter(Config.model_validate(tree))


def byte_level(*merged: str) -> Tokenizer:
    """A token a byte, and one for each of `merged`."""
    vocab = {byte: at for at, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in merged:
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocab[word[:end]] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_a_token_may_hold_the_end_of_a_stop_string_and_more(base_config, tmp_path):
    prompter = bpe_prompter(base_config, tmp_path, byte_level("topEx"), ["stopE"])
    token_ids = prompter.encode(sample_pb2.Prompt(text="a stopExyz"), None)
    texts = prompter.decode([[token] for token in token_ids])
    assert texts == ["a", " ", "s", "topEx", "y", "z"]
    for seam in range(4):
        assert prompter.stop_end(token_ids, seam) == 4
    assert prompter.ended(token_ids[:4], 100) == sample_pb2.FINISH_REASON_STOP
    assert prompter.ended(token_ids[:3], 100) == sample_pb2.FINISH_REASON_UNSPECIFIED


def test_the_seam_may_lie_within_a_character(base_config, tmp_path):
    prompter = bpe_prompter(base_config, tmp_path, byte_level(), ["→é"])
    token_ids = prompter.encode(sample_pb2.Prompt(text="x→éy"), None)
    assert len(token_ids) == 7  # a token a byte
    for seam in range(6):
        assert prompter.stop_end(token_ids, seam) == 6


def test_a_space_that_a_stop_string_begins_with_is_seen(base_config, tmp_path):
    """Some decoders strip the space at the beginning of what they decode."""
    tokenizer = Tokenizer(models.BPE(vocab={"▁": 0, "a": 1, "b": 2}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    prompter = bpe_prompter(base_config, tmp_path, tokenizer, [" ab"])
    token_ids = [1, 0, 1, 2, 1]
    assert prompter.decode([token_ids]) == ["a aba"]
    for seam in range(4):
        assert prompter.stop_end(token_ids, seam) == 4


def test_a_stop_id_at_the_seam_ends_the_completion(base_config):
    prompter = Prompter(changed(base_config, sampling={"stop_token_ids": [50]}))
    assert prompter.ended([7, 50], 5) == sample_pb2.FINISH_REASON_STOP
    assert prompter.ended([50, 7], 5) == sample_pb2.FINISH_REASON_UNSPECIFIED
    assert prompter.stop_end([7, 50], 0) is None  # what an engine matches by itself
