"""The judge client against a local HTTP server that misbehaves in every way a server can."""

import json
import socket
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from judge_server import Fault, serving

from evaluate import judge
from evaluate.endpoint import Endpoint, retry_after
from evaluate.judge import Judge, Request, request_key
from evaluate.pairs import render_judge
from evaluate.settings import JudgeSettings
from lit_llama.utils import UserError

KEY = "sk-test-0123456789abcdef"
CUT = Fault(content=b'{"choices": [{"mess', missing=100)
FAULTS = {
    "busy": Fault(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0"}),
    "busy without a time": Fault(429),
    "server error": Fault(500, b"boom"),
    "overloaded": Fault(503, b"", {"Retry-After": "0"}),
    "half an answer": CUT,
    "no answer": Fault(content=b"", missing=50),
    "garbage": Fault(content=b"\xff\xfe<html>not json</html>"),
    "other json": Fault(content=b'{"choices": []}'),
    "a number": Fault(content=b'{"choices": [{"message": {"content": 7}}]}'),
}


@pytest.fixture(autouse=True)
def key_and_short_delays(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(judge, "FIRST_DELAY", 0.01)


def requests(n: int) -> list[Request]:
    return [Request((("user", f"judge number {i}"),), {"id": i}) for i in range(n)]


def echo(body, number):
    return f"about {body['messages'][0]['content']}"


def open_judge(server, folder, **settings) -> Judge:
    url = server if isinstance(server, str) or server is None else server.url
    settings = {"judge_model": "gpt-test", "judge_timeout": 20, **settings}
    return Judge(JudgeSettings(judge_url=url, **settings), folder)


def replies(records) -> list[str | None]:
    return [record and record["reply"] for record in records]


def expected(n: int) -> list[str]:
    return [f"about judge number {i}" for i in range(n)]


def cached_keys(folder) -> list[str]:
    return [json.loads(line)["key"] for line in (folder / "judgements.jsonl").read_text().splitlines()]


def message(error) -> str:
    """Return the text of a UserError; check that it is one line and does not contain the API key."""
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and KEY not in text
    return text


def test_every_reply_is_cached_and_no_request_is_sent_twice(tmp_path, capfd):
    with serving(echo) as server:
        opened = open_judge(server, tmp_path)
        assert replies(opened.ask(requests(20) + requests(5))) == expected(20) + expected(5)
        assert len(server.requests) == 20 and server.keys == {f"Bearer {KEY}"}
        assert replies(open_judge(server, tmp_path).ask(requests(22))) == expected(22)
        assert len(server.requests) == 22
    log = "".join(capfd.readouterr())
    assert f"asking gpt-test at {server.url}/chat/completions for 2 of 22 judgements" in log
    body = server.requests[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("gpt-test", 0, 1024)
    assert len(set(cached_keys(tmp_path))) == len(cached_keys(tmp_path)) == 22
    record = json.loads((tmp_path / "judgements.jsonl").read_text().splitlines()[0])
    assert record["served_model"] == "gpt-test-0613" and record["endpoint"] == f"{server.url}/chat/completions"
    assert KEY not in (tmp_path / "judgements.jsonl").read_text() + log


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"judge_max_tokens": 7},
        {"judge_body": {"seed": 1, "temperature": 0.5}},
        {"judge_body": {"max_tokens": None, "temperature": None}},
    ],
    ids=str,
)
def test_a_finished_run_is_replayed_without_an_endpoint(tmp_path, settings):
    """The model and its settings are read from the cache."""
    with serving(echo) as server:
        opened = open_judge(server, tmp_path, **settings)
        records = opened.ask(requests(8))
    replayed = open_judge(None, tmp_path, judge_model=None)
    assert replayed.ask(requests(8)) == records
    assert replayed.describe(records) == opened.describe(records) and replayed.describe(records)["replies"] == 8
    with pytest.raises(UserError) as error:
        replayed.ask(requests(10))
    assert "lacks 2 of 10 judgements by gpt-test" in message(error)


def test_a_cache_may_have_replies_for_several_settings(tmp_path):
    with serving(echo) as server:
        records = [open_judge(server, tmp_path, judge_max_tokens=n).ask(requests(2)) for n in (5, 6)]
    assert open_judge(None, tmp_path, judge_max_tokens=6).ask(requests(2)) == records[1]
    with pytest.raises(UserError, match=r"Name the judge with --judge_model; .* has replies by gpt-test"):
        open_judge(None, tmp_path, judge_model=None)
    with pytest.raises(UserError, match="lacks 2 of 2 judgements by other"):
        open_judge(None, tmp_path, judge_model="other").ask(requests(2))


@pytest.mark.parametrize("name", FAULTS)
def test_transient_faults_lose_no_replies(tmp_path, capfd, name):
    """Every third request fails once; each reply still arrives exactly once."""
    seen = set()

    def reply(body, number):
        prompt = body["messages"][0]["content"]
        if int(prompt.split()[-1]) % 3 == 0 and prompt not in seen:
            seen.add(prompt)
            return FAULTS[name]
        return echo(body, number)

    with serving(reply) as server:
        opened = open_judge(server, tmp_path)
        assert replies(opened.ask(requests(12))) == expected(12)
    assert len(server.requests) == 16 and set(server.replies.values()) == {1}
    assert len(set(cached_keys(tmp_path))) == len(cached_keys(tmp_path)) == 12 and not opened.failed
    assert KEY not in "".join(capfd.readouterr())


def test_a_slow_reply_is_requested_again(tmp_path):
    with serving(lambda body, number: Fault(hang=30) if number == 1 else echo(body, number)) as server:
        opened = open_judge(server, tmp_path, judge_timeout=3.0, judge_workers=1)
        assert replies(opened.ask(requests(3))) == expected(3)
        assert len(server.requests) == 4


def test_retry_after_delays_the_next_request(tmp_path):
    times = []

    def reply(body, number):
        times.append(time.monotonic())
        return Fault(429, b"", {"Retry-After": "1"}) if number == 0 else echo(body, number)

    with serving(reply) as server:
        open_judge(server, tmp_path, judge_workers=1).ask(requests(3))
    assert times[1] - times[0] >= 1.0


def test_a_rate_limit_does_not_end_a_run_that_makes_progress(tmp_path):
    """The server answers one request in four and rate-limits the others."""
    with serving(lambda body, number: echo(body, number) if number % 4 == 3 else FAULTS["busy"]) as server:
        opened = open_judge(server, tmp_path, judge_retries=4)
        assert replies(opened.ask(requests(24))) == expected(24)


def test_retry_after_values():
    later = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=100), usegmt=True)
    assert 95 < retry_after(later) <= 100
    assert [retry_after(v) for v in ("7", "0.5", "-3", "soon", "", None)] == [7, 0.5, 0, None, None, None]


@pytest.mark.parametrize(
    "fault, words",
    [
        (Fault(429, b"", {"Retry-After": "86400"}), "asks to wait for 86400 s"),
        (Fault(402, b"add more credits"), "has no credit left (HTTP 402: add more credits)"),
        (Fault(429, b'{"error": {"code": "insufficient_quota"}}'), "has no credit left"),
        (Fault(404, b"model gpt-test not found"), "no such endpoint or model"),
        (Fault(400, f"bad request of {KEY}".encode()), "HTTP 400: bad request of ***"),
        (Fault(500, b"boom"), "does not answer (HTTP 500: boom)"),
        (Fault(302, b"", {"Location": "http://127.0.0.1:1/v1/chat/completions"}), "HTTP 302"),
        (Fault(content=b"<html>welcome"), "not a chat completion: <html>welcome"),
        (Fault(content=b'{"choices": [{"message": {"content": "\\ud800"}}]}'), "not a chat completion: "),
        (Fault(content=b'{"model": NaN, "choices": [{"message": {"content": "8 9"}}]}'), "not a chat completion: "),
    ],
)
def test_an_endpoint_that_never_works_ends_the_run_with_a_clear_error(tmp_path, fault, words):
    with serving(lambda body, number: fault) as server, pytest.raises(UserError) as error:
        open_judge(server, tmp_path, judge_retries=1).ask(requests(3))
    assert words in message(error) and "run the command again to continue" in message(error)
    assert not (tmp_path / "judgements.jsonl").exists()


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_run_immediately_and_is_never_printed(tmp_path, capfd, status):
    with serving(lambda body, number: Fault(status, f"Incorrect API key {KEY}".encode())) as server:
        with pytest.raises(UserError) as error:
            open_judge(server, tmp_path, judge_workers=1).ask(requests(9))
        assert len(server.requests) == 1
    assert "refused the API key" in message(error) and "OPENAI_API_KEY" in message(error)
    assert KEY not in "".join(capfd.readouterr())


def test_a_flagged_request_is_not_a_refused_key(tmp_path):
    flagged = Fault(403, b'{"error": {"message": "gpt-test requires moderation. Your input was flagged."}}')
    with serving(lambda body, number: flagged if number == 1 else echo(body, number)) as server:
        opened = open_judge(server, tmp_path, judge_workers=1)
        assert replies(opened.ask(requests(4))).count("") == 1
    assert "HTTP 403" in opened.failed.popitem()[1]


def test_a_redirect_does_not_leak_the_key(tmp_path):
    with serving(echo) as other, serving(lambda body, number: Fault(307, b"", {"Location": other.url})) as server:
        with pytest.raises(UserError, match="HTTP 307"):
            open_judge(server, tmp_path).ask(requests(1))
        assert not other.requests


def test_an_unreachable_judge_raises_a_clear_error(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening
        began = time.monotonic()
        with pytest.raises(UserError) as error:
            open_judge(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path).ask(requests(3))
    assert "cannot be reached" in message(error) and "0 of 3 judgements" in message(error)
    assert time.monotonic() - began < 5


def test_replies_before_the_death_of_the_server_are_kept(tmp_path):
    with serving(echo, die_after=17) as server, pytest.raises(UserError) as error:
        open_judge(server, tmp_path, judge_retries=2).ask(requests(40))
    before = cached_keys(tmp_path)
    # replies in flight when the server died never arrived
    assert 17 - 4 <= len(before) <= 17 and f"{len(before)} of 40 judgements" in message(error)
    with serving(echo) as server:
        assert replies(open_judge(server, tmp_path).ask(requests(40))) == expected(40)
        assert len(server.requests) == 40 - len(before)
    assert len(set(cached_keys(tmp_path))) == len(cached_keys(tmp_path)) == 40


def test_a_request_that_always_fails_does_not_affect_the_others(tmp_path):
    def reply(body, number):
        return (
            Fault(400, b"the prompt is too long")
            if body["messages"][0]["content"].endswith(" 5")
            else echo(body, number)
        )

    with serving(reply) as server:
        opened = open_judge(server, tmp_path)
        records = opened.ask(requests(12))
    assert replies(records) == ["" if i == 5 else text for i, text in enumerate(expected(12))]
    described = opened.describe(records)
    assert described["failed_requests"] == ["HTTP 400: the prompt is too long"] and described["replies"] == 11
    # a finished run can be repeated, with the endpoint and without it
    with serving(reply) as server:
        again = open_judge(server, tmp_path)
        assert again.ask(requests(12)) == records and len(server.requests) == 1
        assert again.describe(records) == described
    offline = Judge(JudgeSettings(), tmp_path)
    assert offline.ask(requests(12)) == records and offline.describe(records) == described
    with serving(echo) as server:  # only the failed request is sent again
        assert replies(open_judge(server, tmp_path).ask(requests(12))) == expected(12)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "refuses",
    [lambda id, number: id < 12, lambda id, number: 3 <= number < 15],
    ids=["the first questions", "many in a row"],
)
def test_a_content_filter_may_refuse_many_requests(tmp_path, refuses, capsys):
    def reply(body, number):
        id = int(body["messages"][0]["content"].split()[-1])
        return Fault(400, b"filtered") if refuses(id, number) else echo(body, number)

    with serving(reply) as server:
        opened = open_judge(server, tmp_path, judge_workers=1)
        records = opened.ask(requests(40))
    assert replies(records).count("") == 12 and opened.describe(records)["replies"] == 28
    assert "note: 12 of 40 requests have no reply (HTTP 400: filtered); run again to send" in capsys.readouterr().err
    report = render_judge({**opened.describe(records), "prompts": {}})
    assert "12 requests without a reply (HTTP 400: filtered).\n" in report


def test_a_run_ends_when_the_credit_does(tmp_path):
    reply = lambda body, number: echo(body, number) if number < 6 else Fault(402, b"add more credits")  # noqa: E731
    with serving(reply) as server, pytest.raises(UserError) as error:
        open_judge(server, tmp_path, judge_workers=1).ask(requests(30))
    assert "has no credit left (HTTP 402: add more credits). 6 of 30 judgements" in message(error)
    assert len(server.requests) == 7 and len(cached_keys(tmp_path)) == 6


def test_an_endpoint_that_stops_accepting_requests_ends_a_later_run(tmp_path):
    """For example because there is no credit left."""
    with serving(echo) as server:
        open_judge(server, tmp_path).ask(requests(6))
    with serving(lambda body, number: Fault(400, b"no credit")) as server, pytest.raises(UserError) as error:
        open_judge(server, tmp_path).ask(requests(30))
    assert "does not answer these requests (HTTP 400: no credit)" in message(error) and len(server.requests) < 12


def test_a_cache_truncated_by_a_kill_is_completed(tmp_path):
    with serving(echo) as server:
        open_judge(server, tmp_path).ask(requests(6))
        path = tmp_path / "judgements.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        # one line is a duplicate, and the last one is cut off
        path.write_bytes(b"".join(lines[:4]) + lines[0] + lines[4][: len(lines[4]) // 2])
        opened = open_judge(server, tmp_path)
        assert replies(opened.ask(requests(6))) == expected(6)
        assert len(server.requests) == 6 + 2
    assert opened.describe(opened.ask(requests(6)))["replies"] == 6
    assert len(path.read_text().splitlines()) == 7 and all(map(json.loads, path.read_text().splitlines()))


def test_the_request_key_depends_only_on_what_affects_the_reply():
    def key_of(text="a", **settings):
        return request_key(Request((("user", text),)).body(JudgeSettings(judge_model="m", **settings)))

    same = {"judge_url": "http://elsewhere/v1", "judge_key_env": "OTHER", "judge_workers": 9, "judge_timeout": 1}
    assert key_of() == key_of(**same)
    others = [
        key_of("b"),
        key_of(judge_max_tokens=5),
        key_of(judge_body={"seed": 1}),
        key_of(judge_body={"model": "n"}),
    ]
    assert len({key_of(), *others}) == 5


def test_judge_body_adds_and_removes_request_fields(tmp_path):
    body = {"max_tokens": None, "max_completion_tokens": 50, "temperature": 1}
    with serving(echo) as server:
        open_judge(server, tmp_path, judge_body=body).ask(requests(1))
    assert {k: v for k, v in server.requests[0].items() if k not in ("model", "messages")} == {
        "max_completion_tokens": 50,
        "temperature": 1,
    }


def test_replies_that_are_cut_at_the_limit_are_reported(tmp_path, capsys):
    content = json.dumps({"choices": [{"message": {"content": ""}, "finish_reason": "length"}]}).encode()
    with serving(lambda body, number: Fault(content=content) if number < 2 else echo(body, number)) as server:
        open_judge(server, tmp_path).ask(requests(5))
    note = "note: 2 of 5 replies were cut at the limit (--judge_max_tokens or --judge_body)."
    assert note in capsys.readouterr().err
    open_judge(None, tmp_path).ask(requests(5))
    assert note in capsys.readouterr().err


def test_a_filtered_reply_is_empty_but_not_a_failure(tmp_path):
    content = json.dumps({"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]}).encode()
    with serving(lambda body, number: Fault(content=content)) as server:
        assert replies(open_judge(server, tmp_path).ask(requests(1))) == [""]


@pytest.mark.parametrize(
    "url, address",
    [
        ("http://h:1", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1/", "http://h:1/v1/chat/completions"),
        ("https://h/api/openai/chat/completions", "https://h/api/openai/chat/completions"),
        ("https://h/v1?api-version=2", "https://h/v1/chat/completions?api-version=2"),
    ],
)
def test_endpoint_addresses(url, address):
    assert Endpoint(url).address == address
    assert "?" not in Endpoint(url).name


@pytest.mark.parametrize(
    "settings",
    [
        {"judge_url": "127.0.0.1:8000"},
        {"judge_url": "ftp://h/v1"},
        {"judge_url": "http://h:port/v1"},
        {"judge_url": "http://a..b/v1"},
        {"judge_url": f"http://{'a' * 64}/v1"},
        {"judge_url": "http://h/ü"},
        {"judge_url": "http://日本/v1"},
        {"judge_url": f"http://user:{KEY}@h/v1"},
        {"judge_url": "http://h/v1", "judge_model": None},
        {"judge_url": "http://h/v1", "judge_key_env": KEY},
        {"judge_url": "http://h/v1", "judge_workers": 0},
        {"judge_url": "http://h/v1", "judge_timeout": 0},
        {"judge_url": "http://h/v1", "judge_retries": -1},
        {"judge_url": None, "judge_model": None},
    ],
)
def test_invalid_settings_raise_a_clear_error(tmp_path, settings):
    with pytest.raises(UserError) as error:
        Judge(JudgeSettings(**{"judge_model": "m", **settings}), tmp_path)
    message(error)


def test_a_key_with_special_characters_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-über\nsecret")
    with pytest.raises(UserError, match="special characters"):
        open_judge("http://h/v1", tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        '{"id": 1, "answer": "no judgement"}\n',
        '{"key": "a", "reply": "no line break"}',
        '{"key": "a", "reply": "no hash"}\n{"key": "b", "reply": "no line break"}',
    ],
)
def test_a_file_without_judgments_is_refused_as_a_cache(tmp_path, content):
    path = tmp_path / "judgements.jsonl"
    path.write_text(content)
    with serving(echo) as server, pytest.raises(UserError, match="not a file of judgements; move the file away or"):
        open_judge(server, tmp_path).ask(requests(1))
    assert path.read_text() == content


def test_a_file_that_ends_with_another_line_is_refused_as_a_cache(tmp_path):
    (tmp_path / "judgements.jsonl").write_text('{"id": 1, "answer": "no line break"}')
    with pytest.raises(UserError, match="ends with a line that this program did not write"):
        open_judge(None, tmp_path)
