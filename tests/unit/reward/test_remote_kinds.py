"""What each kind of server is asked, and which of its answers become scores."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiohttp import web

from polyhead.v1 import reward_pb2
from services.common.errors import ConfigError
from services.reward.jobs import FailureKind, Job, Result
from services.reward.remote.station import RemoteStation
from tests.kit.reward_items import item
from tests.kit.reward_servers import grpc_server, http_server, remote
from tests.kit.tls_proxy import make_certificate

MESSAGES = '[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]'


async def one(station: RemoteStation, completion: str = "42", **fields: object) -> Result:
    [result] = await station.score([item(completion, **fields)])
    return result


@pytest.mark.parametrize(
    ("answer", "reward", "parts"),
    [
        (0.5, 0.5, {}),
        (-3, -3.0, {}),
        ({"score": 1, "acc": 1, "pred": "x"}, 1.0, {"acc": 1.0}),
        ({"reward": 0.25}, 0.25, {}),
    ],
)
async def test_remote_rm_takes_numbers_and_objects(answer, reward, parts):
    async with http_server(lambda body: answer) as server, remote("http", server.url) as station:
        result = await one(station, "4 2", label="42")
        assert result.verdict == (reward, parts, ())
        assert station.scorer == "remote/http"
    assert server.calls == [{"prompt": "What?", "response": "4 2", "label": "42"}]


async def test_remote_rm_gets_messages_as_slime_sends_them():
    async with http_server(lambda body: 1) as server, remote("http", server.url) as station:
        await one(station, prompt="", messages_json=MESSAGES, label="")
    assert server.calls[0]["prompt"][1] == {"role": "user", "content": "What?"}
    assert server.calls[0]["label"] is None


NO_SCORES = [
    ("text", "1.0", "the returned reward is a str, not a number"),
    ("null", None, "the returned reward is None, not a number"),
    ("list", [1.0], "the returned reward is a list, not a number"),
    ("no key", {"value": 1}, 'has neither "score" nor "reward"'),
    ("a text as score", {"score": "0.3"}, "not a number"),
    ("NaN", web.Response(body=b"NaN"), "the answer is not JSON"),
    ("infinite", web.Response(body=b'{"score": 1e999}'), ""),
    ("html", web.Response(text="<html>welcome</html>"), "<html>welcome</html>"),
    ("nothing", web.Response(), "the answer is not JSON"),
    ("too long", web.Response(body=b"1" * (65 << 10)), "the answer is longer than 64 KiB"),
    ("422", web.json_response({"detail": "no boxed answer"}, status=422), "no boxed answer"),
    ("400", web.Response(status=400, text="bad"), "HTTP 400: bad"),
]


@pytest.mark.parametrize(("answer", "reason"), [row[1:] for row in NO_SCORES], ids=[row[0] for row in NO_SCORES])
async def test_what_is_no_score_is_the_samples_failure_where_the_server_scores_others(answer, reason):
    def answers(body: dict[str, Any]) -> Any:
        return 1 if body["response"] == "fine" else answer

    async with http_server(answers) as server, remote("http", server.url) as station:
        assert (await one(station, "fine")).verdict == (1.0, {}, ())
        result = await one(station, "odd")
        assert (result.verdict, result.failure) == (None, FailureKind.RAISED)
        assert reason in result.reason
        refused = isinstance(answer, web.Response) and answer.status >= 400
        assert [call["response"] for call in server.calls] == ["fine", "odd", *(["fine"] if not refused else [])]
        assert station.room is None


UNREACHABLE = [
    (401, "unauthorised"),
    (403, "forbidden"),
    (404, "no such route"),
    (405, "no such route"),
    (429, "HTTP 429"),
    (502, "HTTP 502"),
    (503, "HTTP 503"),
    (301, "redirects are not followed"),
    (307, "redirects are not followed"),
    (500, "HTTP 500"),
]


@pytest.mark.parametrize(("status", "reason"), UNREACHABLE)
async def test_what_the_server_is_to_blame_for_is_unavailable(status, reason):
    def answer(body: Any) -> web.Response:
        return web.Response(status=status, headers={"Location": "/elsewhere"} if status < 400 else {})

    async with http_server(answer) as server, remote("http", server.url) as station:
        result = await one(station)
    assert (result.verdict, result.failure) == (None, FailureKind.UNAVAILABLE)
    assert reason in result.reason
    assert set(server.paths) == {"/score"}
    # A 500 may be of the sample's making: before it is blamed, the server is tried with another one.
    assert len(server.calls) == (4 if status == 500 else 3 if status >= 429 else 1)


async def test_a_token_is_sent_and_told_to_nobody(monkeypatch):
    def answer(body: Any) -> web.Response:
        return web.Response(status=422, text="you sent me a-secret-word")

    async with http_server(answer) as server, remote("http", server.url, token="a-secret-word") as station:
        result = await one(station)
    assert server.headers[0]["Authorization"] == "Bearer a-secret-word"
    assert "***" in result.reason
    assert "a-secret-word" not in result.reason


async def test_proxies_of_the_environment_are_not_used(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "grpc_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    async with http_server(lambda body: 1) as server, remote("http", server.url) as station:
        assert (await one(station)).verdict == (1.0, {}, ())
    async with grpc_server(lambda item: 1.0) as server, remote("grpc", server.url) as station:
        assert (await one(station)).verdict == (1.0, {}, ())


JUDGE = {"model": "judge-1", "prompt": "Q {prompt}\nA {response}\nL {label} {other}", "low": 0, "high": 10}


def says(text: object) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


async def test_a_judge_is_asked_with_the_template_and_its_last_score_counts():
    text = "First I thought Score: 2, but: SCORE = 7.5"
    async with http_server(lambda body: says(text)) as server:
        url = f"http://127.0.0.1:{server.port}/v1/"
        async with remote("judge", url, judge={**JUDGE, "system": "You judge."}) as station:
            result = await one(station, "{label} {0} %s", label="forty-two")
    assert result.verdict == (7.5, {}, ())
    assert server.paths == ["/v1/chat/completions"]
    assert server.calls[0]["model"] == "judge-1"
    assert server.calls[0]["temperature"] == 0
    assert server.calls[0]["messages"] == [
        {"role": "system", "content": "You judge."},
        {"role": "user", "content": "Q What?\nA {label} {0} %s\nL forty-two {other}"},
    ]


async def test_a_judges_prompt_may_be_a_file_and_chat_messages_become_text(tmp_path: Path):
    (tmp_path / "judge.txt").write_text("<{prompt}>")
    judge = {"model": "judge-1", "prompt_file": tmp_path / "judge.txt"}
    async with (
        http_server(lambda body: says("score: 1")) as server,
        remote("judge", server.url, judge=judge) as station,
    ):
        await one(station, prompt="", messages_json=MESSAGES)
    assert server.calls[0]["messages"][0]["content"] == "<system: Be brief.\n\nuser: What?>"


@pytest.mark.parametrize(
    "answer",
    [
        says("I cannot say."),
        says("Score: 11"),
        says("Score: -1"),
        says("Score: many"),
        says(""),
        says(None),
        says({"score": 5}),
        {"choices": []},
        {"error": {"message": "no"}},
        [],
        5,
    ],
)
async def test_a_judge_that_gives_no_score_gives_no_number(answer):
    async with http_server(lambda body: answer) as server, remote("judge", server.url, judge=JUDGE) as station:
        result = await one(station)
    assert (result.verdict, result.failure) == (None, FailureKind.UNAVAILABLE)


async def test_classify_sends_token_ids_where_there_are_some_and_text_elsewhere():
    def answer(body: dict[str, Any]) -> Any:
        asked = body.get("input_ids") or body["text"]
        return [{"embedding": [0.0, float(len(each))], "meta_info": {}} for each in asked]

    results: dict[str, Result] = {}

    def job(name: str, token_ids: bytes) -> Job:
        each = item("abc", sample_id=name, token_ids=token_ids)
        return Job(each, lambda result: results.setdefault(name, result))

    settings = {"batch_size": 4, "classify": {"label": 1}}
    async with http_server(answer) as server:
        url = f"http://127.0.0.1:{server.port}"
        async with remote("classify", url, **settings) as station:
            assert station.wants_tokens
            station.submit([job("tokens", b"\1\0\0\0\2\0\0\0")])
            await station.score([item("abc", sample_id="text")])
            [text] = await station.score([item("abc", sample_id="text")])
    assert results["tokens"].verdict == (2.0, {}, ())
    assert text.verdict == (float(len("What?abc")), {}, ())
    assert {"input_ids": [[1, 2]]} in server.calls
    assert {"text": ["What?abc"]} in server.calls
    assert set(server.paths) == {"/classify"}


@pytest.mark.parametrize("answer", [[], [{}], [{"embedding": []}], [{"embedding": ["x"]}], {"embedding": [1.0]}, 1.0])
async def test_classify_without_a_logit_gives_no_number(answer):
    async with http_server(lambda body: answer) as server, remote("classify", server.url) as station:
        result = await one(station)
    assert (result.verdict, result.failure) == (None, FailureKind.UNAVAILABLE)


async def test_grpc_batches_and_carries_scores_parts_and_reasons():
    def answer(asked: reward_pb2.ScoreItem) -> Any:
        if asked.completion == "bad":
            return reward_pb2.ScoreError(kind=reward_pb2.SCORE_ERROR_KIND_FAILED, message="too\nlong")
        result = reward_pb2.ScoreResult(sample_id=asked.sample_id)
        result.score.reward = float(asked.completion)
        result.score.parts["label"] = float(asked.prompt.label)
        return result

    words = ["1", "2", "bad", "4"]
    async with grpc_server(answer) as server, remote("grpc", server.url, token="word") as station:
        results = await station.score([item(word, sample_id=f"s{word}") for word in words])
    assert server.batches == [["s1", "s2", "sbad", "s4"]]
    assert server.metadata[0]["authorization"] == "Bearer word"
    assert [result.verdict for result in results] == [
        (1.0, {"label": 42.0}, ()),
        (2.0, {"label": 42.0}, ()),
        None,
        (4.0, {"label": 42.0}, ()),
    ]
    assert (results[2].failure, results[2].reason) == (FailureKind.RAISED, "too long")


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (float("nan"), FailureKind.UNAVAILABLE),
        (float("inf"), FailureKind.UNAVAILABLE),
        (reward_pb2.ScoreResult(sample_id="another"), FailureKind.UNAVAILABLE),
        (reward_pb2.ScoreResult(sample_id="g00000001-000"), FailureKind.UNAVAILABLE),
        (grpc.StatusCode.INVALID_ARGUMENT, FailureKind.RAISED),
        (grpc.StatusCode.UNAUTHENTICATED, FailureKind.UNAVAILABLE),
        (grpc.StatusCode.PERMISSION_DENIED, FailureKind.UNAVAILABLE),
        (grpc.StatusCode.UNIMPLEMENTED, FailureKind.UNAVAILABLE),
        (grpc.StatusCode.UNAVAILABLE, FailureKind.UNAVAILABLE),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, FailureKind.UNAVAILABLE),
        (grpc.StatusCode.INTERNAL, FailureKind.UNAVAILABLE),
        (reward_pb2.ScoreError(kind=reward_pb2.SCORE_ERROR_KIND_UNAVAILABLE), FailureKind.UNAVAILABLE),
    ],
)
async def test_grpc_answers_that_are_no_scores(answer, failure):
    async with grpc_server(lambda asked: answer) as server, remote("grpc", server.url) as station:
        result = await one(station)
    assert (result.verdict, result.failure) == (None, failure)


def credentials(certificate: Path, key: Path, *, ask_for: Path) -> grpc.ServerCredentials:
    pair = (key.read_bytes(), certificate.read_bytes())
    return grpc.ssl_server_credentials([pair], ask_for.read_bytes(), require_client_auth=True)


async def test_grpc_over_mutual_tls(tmp_path: Path):
    certificate, key = make_certificate(tmp_path / "server")
    own, own_key = make_certificate(tmp_path / "client", "reward-0")
    tls = credentials(certificate, key, ask_for=own)
    files = {"ca": certificate, "cert": own, "key": own_key}
    async with grpc_server(lambda asked: 1.0, credentials=tls) as server:
        url = f"grpcs://localhost:{server.port}"
        async with remote("grpc", url, **files) as station:
            assert (await one(station)).verdict == (1.0, {}, ())
        for settings in ({"ca": certificate}, {**files, "ca": own}):
            async with remote("grpc", url, **settings) as station:
                assert (await one(station)).failure is FailureKind.UNAVAILABLE
        async with remote("grpc", f"grpcs://127.0.0.1:{server.port}", **files) as station:
            assert (await one(station)).failure is FailureKind.UNAVAILABLE, "the certificate is localhost's"


async def test_http_over_mutual_tls(tmp_path: Path):
    certificate, key = make_certificate(tmp_path / "server")
    own, own_key = make_certificate(tmp_path / "client", "reward-0")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=own)
    tls.load_cert_chain(certificate, key)
    tls.verify_mode = ssl.CERT_REQUIRED
    files = {"ca": certificate, "cert": own, "key": own_key, "token": "word"}
    async with http_server(lambda body: 1, tls=tls) as server:
        url = f"https://localhost:{server.port}/score"
        async with remote("http", url, **files) as station:
            assert (await one(station)).verdict == (1.0, {}, ())
        for settings in ({"ca": certificate}, {**files, "ca": own}):
            async with remote("http", url, **settings) as station:
                assert (await one(station)).failure is FailureKind.UNAVAILABLE
    with pytest.raises(ConfigError, match="the certificates cannot be used"):
        async with remote("http", url, ca=tmp_path / "nowhere.pem"):
            pass


async def test_batches_fill_up_to_their_size_within_the_delay():
    def sizes(batches: Sequence[Sequence[str]]) -> list[int]:
        return [len(batch) for batch in batches]

    settings = {"batch_size": 8, "batch_delay_s": 0.05}
    async with grpc_server(lambda asked: 1.0) as server, remote("grpc", server.url, **settings) as station:
        await station.score([item("x", sample_id=f"s{number}") for number in range(20)])
    assert sizes(server.batches) == [8, 8, 4]
