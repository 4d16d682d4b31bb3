"""`polyhead reward test` against real pools."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
import structlog

from services.cli.main import main
from services.cli.reward_rows import read_rows
from services.common.errors import ConfigError
from tests.kit.reward_items import BY_ORDER, KIT

GOOD = {"completion": r"so it is \boxed{42}", "label": 42}


@pytest.fixture(autouse=True)
def _logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The verb configures the logging of its process for good, which here is that of other tests too."""

    def configure(*_: object, stream: TextIO) -> None:
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(stream), cache_logger_on_first_use=False)

    before = structlog.get_config()
    monkeypatch.setattr("services.cli.reward_test.configure_logging", configure)
    yield
    structlog.configure(**before)


def write(path: Path, *rows: object) -> Path:
    file = path / "rows.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def score(file: Path, *options: str, scorer: str = "math") -> int:
    return main(["reward", "test", "--scorer", scorer, "--file", str(file), *options])


def test_a_file_that_agrees(tmp_path, capsys):
    rows = [GOOD | {"reward": 1}, {"response": "43", "label": "42", "reward": 0.0}, "", GOOD]
    assert score(write(tmp_path, *rows), "--processes", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["line", "reward", "expected", "ms"]
    assert [line.split()[:2] for line in lines[1:4]] == [["1", "1"], ["2", "0"], ["4", "1"]]
    assert lines[4] == "3 scored, 0 failed, 0 of 2 disagree"
    assert "scores/s, in the scorer p50" in lines[5]


def test_disagreements_and_failures_are_said_and_end_with_status_1(tmp_path, capsys):
    rows = [GOOD, GOOD | {"judged": 0}, {"completion": "1", "label": "???", "judged": 1}]
    rows[0] = rows[0] | {"judged": True}
    assert score(write(tmp_path, *rows), "--expect", "judged", "--problems") == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "2 1 0" in output
    assert "disagrees parsed=1" in output
    assert "raised: label '???' cannot be read as mathematics" in output
    assert "2 scored, 1 failed, 1 of 2 disagree" in output


def test_what_a_scorer_says_is_no_markup(tmp_path, capsys):
    assert score(write(tmp_path, {"completion": "raise [red]it[/red]"}), "--path", str(KIT), scorer=BY_ORDER) == 1
    assert "cannot score [red]it[/red]" in " ".join(capsys.readouterr().out.split())


def test_the_same_as_json(tmp_path, capsys):
    rows = [
        {"completion": "dict", "label": "", "metadata": {"a": 1}, "prompt": [{"role": "user", "content": "?"}]},
        {"completion": "hang"},
        {"completion": "die"},
    ]
    options = ["--path", str(KIT), "--timeout", "0.5", "--json"]
    assert score(write(tmp_path, *rows), *options, scorer=BY_ORDER) == 1
    document = json.loads(capsys.readouterr().out)
    assert [row["reward"] for row in document["rows"]] == [0.5, None, None]
    assert document["rows"][0]["parts"] == {"acc": 1.0, "length": 3.0}
    assert [row["failure"] for row in document["rows"]] == [None, "timed_out", "died"]
    assert document["rows"][1]["reason"] == "timed out after 0.5 s"
    assert (document["scored"], document["failed"], document["compared"]) == (1, 2, 0)
    assert document["p99_ms"] >= document["p50_ms"] >= 0
    assert document["scores_per_s"] > 0


RUN = """
[plugins]
paths = [{kit!r}]
[reward]
{reward}
"""


@pytest.mark.parametrize(
    ("reward", "rows", "rewards"),
    [
        ('weights = {{ exact = 1.0, "reward_functions:by_order" = 0.5 }}', [("ok", "ok"), ("ok", "no")], [1.5, 0.5]),
        ('scorer = "exact"\nshaping = "reward_functions:shapes"', [("1", "1"), ("1", "2")], [0.5, 0.0]),
        ('scorer = "dapo"\nreward_key = "acc"', [("Answer: 1", "1"), ("Answer: 1", "2")], [1.0, 0.0]),
    ],
)
def test_the_rewards_of_a_run(tmp_path, capsys, reward, rows, rewards):
    (tmp_path / "run.toml").write_text(RUN.format(kit=str(KIT), reward=reward.replace("{{", "{").replace("}}", "}")))
    file = write(tmp_path, *({"completion": completion, "label": label} for completion, label in rows))
    assert main(["reward", "test", "-c", str(tmp_path / "run.toml"), "--file", str(file), "--json"]) == 0
    assert [row["reward"] for row in json.loads(capsys.readouterr().out)["rows"]] == rewards


def test_whole_groups_are_rows_of_one_prompt_or_one_group(tmp_path, capsys):
    (tmp_path / "run.toml").write_text(
        RUN.format(kit=str(KIT), reward='scorer = "reward_functions:ranks"\ngroup_rm = true')
    )
    rows = [{"completion": text, "prompt": prompt} for text, prompt in [("aa", "p"), ("a", "p"), ("a", "q")]]
    rows += [{"completion": text, "prompt": text, "group": 7} for text in ("a", "aa", "aaa")]
    options = ["--file", str(write(tmp_path, *rows)), "--json"]
    assert main(["reward", "test", "-c", str(tmp_path / "run.toml"), *options]) == 0
    scored = json.loads(capsys.readouterr().out)["rows"]
    assert [row["reward"] for row in scored] == [1.0, 0.0, 0.0, 0.0, 1.0, 2.0]
    assert [row["parts"]["group"] for row in scored] == [2, 2, 1, 3, 3, 3]


def test_a_scorer_or_a_run_is_given(tmp_path, capsys):
    file = write(tmp_path, GOOD)
    with pytest.raises(SystemExit):
        main(["reward", "test", "--file", str(file)])
    with pytest.raises(SystemExit):
        main(["reward", "test", "--file", str(file), "--scorer", "math", "-c", "run.toml"])


def test_a_prompt_and_metadata_reach_the_scorer(tmp_path):
    [row] = read_rows(write(tmp_path, GOOD | {"prompt": [{"role": "user"}], "metadata": {"difficulty": 3}}))
    assert (row.item.prompt.text, row.item.prompt.messages_json) == ("", '[{"role":"user"}]')
    assert (row.item.prompt.metadata_json, row.item.prompt.label) == ('{"difficulty":3}', "42")
    assert row.expected is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not an object"),
        ({"label": "1"}, '"completion" must be a text, is missing'),
        ({"response": 1}, '"response" must be a text, is int'),
        (GOOD | {"label": ["1"]}, '"label" must be a text or a number, is list'),
        (GOOD | {"label": True}, '"label" must be a text or a number, is bool'),
        (GOOD | {"metadata": "x"}, '"metadata" must be an object, is str'),
        (GOOD | {"prompt": ["x"]}, '"prompt" must be a text or a list of messages, is list'),
        (GOOD | {"reward": "1"}, '"reward" must be a number, is str'),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, row, message):
    with pytest.raises(ConfigError) as caught:
        read_rows(write(tmp_path, GOOD, "", row))
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}:3: {message}")


def test_a_column_that_was_asked_for_must_be_there(tmp_path):
    with pytest.raises(ConfigError, match=r'rows\.jsonl:1: "gold" must be a number, is missing'):
        read_rows(write(tmp_path, GOOD), "gold")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "0"], "--processes: is 0, must be at least 1"),
        (["--timeout", "nan"], "--timeout: is nan, must be positive"),
        (["--expect", "gold"], 'rows.jsonl:1: "gold" must be a number, is missing'),
        (["--scorer", "nothing"], "reward.scorer: unknown scorer 'nothing'"),
        (["--speed", "9"], "--speed: unknown argument"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_no_traceback(tmp_path, capsys, options, message):
    assert score(write(tmp_path, GOOD), *options) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "message"), [("none.jsonl", "cannot be read: No such file"), ("e", "has no rows")])
def test_a_file_that_is_not_there_or_empty(tmp_path, capsys, name, message):
    (tmp_path / "e").write_text("\n")
    assert score(tmp_path / name) == 2
    assert message in capsys.readouterr().err


def test_help_brings_in_nothing_heavy():
    code = (
        "import sys; from services.cli.main import main\n"
        "try: main(['reward', 'test', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'rich', 'pydantic', 'orjson', 'sympy', 'services.reward.pool'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
