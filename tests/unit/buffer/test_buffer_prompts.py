"""The prompt stream: both file formats, slices, shuffling, and one clear line for every kind of bad data."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyhead.v1 import sample_pb2
from services.buffer.prompts import PromptSource, split_slice
from services.common.config.models import DataConfig
from services.common.errors import ConfigError

# Metadata as JSON in a string, just over its limit.
LARGE_ROW = json.dumps({"input": "b", "metadata": json.dumps({"note": "x" * (64 << 10)})})
ROWS = [{"input": f"question {n}", "answer": n, "metadata": {"n": n}} for n in range(10)]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS[:5]) + "\n\n" + "\n".join(map(json.dumps, ROWS[5:])))
    return path


def source(path: Path | str, **settings: object) -> PromptSource:
    return PromptSource(DataConfig(prompt_data=str(path), **settings))


def texts(prompts: PromptSource, count: int, start: int = 0) -> list[str]:
    return [prompts.prompt(ordinal).text.removeprefix("question ") for ordinal in range(start, start + count)]


def test_the_stream_goes_round(jsonl: Path) -> None:
    prompts = source(jsonl)
    assert len(prompts) == 10
    assert texts(prompts, 13) == [str(n % 10) for n in range(13)]


def test_parquet_and_jsonl_give_the_same_prompts(jsonl: Path, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    one, other = source(jsonl, label_key="answer"), source(tmp_path / "rows.parquet", label_key="answer")
    assert [one.prompt(n) for n in range(10)] == [other.prompt(n) for n in range(10)]
    assert one.prompt(3) == sample_pb2.Prompt(text="question 3", label="3", metadata_json='{"n":3}')


@pytest.mark.parametrize(
    ("part", "rows"), [("[2:4]", "23"), ("[-2:]", "89"), ("[:3]", "012"), ("[7:99]", "789"), ("[:-8]", "01")]
)
def test_slices_choose_rows(jsonl: Path, part: str, rows: str) -> None:
    prompts = source(f"{jsonl}@{part}")
    assert texts(prompts, len(rows)) == list(rows)
    assert texts(prompts, 1, start=len(rows)) == [rows[0]]


def test_each_epoch_is_permuted_anew_by_its_seed(jsonl: Path) -> None:
    prompts = source(jsonl, shuffle=True, seed=5)
    for epoch in (0, 1, 2, 0):
        expected = list(range(10))
        random.Random(5 + epoch).shuffle(expected)
        assert texts(prompts, 10, start=10 * epoch) == [str(n) for n in expected]


def test_messages_tools_and_json_strings(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hé"}]
    row = {"chat": messages, "metadata": '{"a": 1}', "tools": '[{"type": "function"}]', "label": "x"}
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(row))
    prompt = source(path, input_key="chat", label_key="label").prompt(0)
    assert json.loads(prompt.messages_json) == messages
    assert (prompt.metadata_json, prompt.tools_json, prompt.label) == ('{"a":1}', '[{"type":"function"}]', "x")


def test_parquet_takes_json_strings_and_names_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [{"input": "a", "metadata": '{"n": 1}', "tools": None}, {"input": "b", "metadata": "", "tools": "[]"}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert [source(path).prompt(n).metadata_json for n in range(2)] == ['{"n":1}', ""]
    pq.write_table(pa.Table.from_pylist([*rows, {"input": "c", "metadata": "[1]"}]), path)
    with pytest.raises(ConfigError, match=r"rows.parquet row 2: 'metadata' is no JSON object"):
        source(path)
    assert len(source(f"{path}@[0:2]")) == 2


@pytest.mark.parametrize(
    ("lines", "settings", "words"),
    [
        (['{"input": "a"}', "", '{"input": '], {}, r"bad.jsonl:3: is not valid JSON"),
        (['{"input": "a"}', '["input"]'], {}, r"bad.jsonl:2: is not a JSON object"),
        (['{"prompt": "a", "x": 1}'], {}, r"bad.jsonl:1: no 'input'; the row has 'prompt', 'x'"),
        (['{"input": "a"}'], {"label_key": "label"}, r"bad.jsonl:1: no 'label'; the row has 'input'"),
        (['{"input": 3}'], {}, r"bad.jsonl:1: 'input' is neither text nor a list of messages"),
        (['{"input": [{"text": "a"}]}'], {}, r"bad.jsonl:1: 'input' is neither text nor a list of messages"),
        (['{"input": "a", "metadata": "{"}'], {}, r"bad.jsonl:1: 'metadata' is not JSON"),
        (['{"input": "a", "metadata": [1]}'], {}, r"bad.jsonl:1: 'metadata' is no JSON object"),
        (['{"input": "a"}', LARGE_ROW], {}, r"bad.jsonl:2: prompt.metadata_json: 65547 bytes, at most 65536"),
        (['{"input": "a"}', json.dumps({"input": "x" * (8 << 20)})], {}, r"bad.jsonl:2: prompt: 8388613 bytes"),
        (['{"input": "a", "tools": {}}'], {}, r"bad.jsonl:1: 'tools' is no JSON list"),
        ([], {}, r"bad.jsonl: no prompts: 0 rows"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(
    tmp_path: Path, lines: list[str], settings: dict[str, object], words: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=words):
        source(path, **settings)


def test_files_that_cannot_be_used(tmp_path: Path, jsonl: Path) -> None:
    (tmp_path / "x.parquet").write_text("no parquet")
    (tmp_path / "x.csv").write_text("input\n")
    for name, words in [
        ("missing.jsonl", "data.prompt_data: no such file: .*missing.jsonl"),
        ("x.parquet", "x.parquet: cannot be read as Parquet"),
        ("x.csv", "ends neither in .jsonl nor in .parquet"),
        ("rows.jsonl@[3:3]", r"no prompts: 10 rows, slice \[3:3\] leaves none"),
        ("rows.jsonl@[3]", r"is not of the form path@\[start:end\]"),
    ]:
        with pytest.raises(ConfigError, match=words):
            source(tmp_path / name)


def test_slice_syntax() -> None:
    assert split_slice("a/b.jsonl") == (Path("a/b.jsonl"), None, None)
    assert split_slice("a@b.jsonl@[:-3]") == (Path("a@b.jsonl"), None, -3)


def test_the_digest_tells_data_keys_and_slice_apart(jsonl: Path, tmp_path: Path) -> None:
    same = tmp_path / "copy.jsonl"
    same.write_bytes(jsonl.read_bytes())
    other = tmp_path / "other.jsonl"
    other.write_bytes(jsonl.read_bytes().replace(b"question 7", b"question 8"))
    digest = source(jsonl).digest
    assert source(same).digest == digest
    different = [
        source(other),
        source(jsonl, label_key="answer"),
        source(jsonl, shuffle=True),
        source(f"{jsonl}@[0:9]"),
    ]
    assert len({digest, *(each.digest for each in different)}) == 5
    assert source(jsonl, seed=9).digest == digest
    assert (source(jsonl, seed=9).seed, source(jsonl, seed=9, shuffle=True).seed) == (0, 9)
