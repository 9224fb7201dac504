"""The server from the client's side: a real process, OpenAI's client, and a comparison with generate/aligner.py."""

import json
import re
import resource
import signal
import socket
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="needs requirements-serve.txt")
openai = pytest.importorskip("openai", reason="needs requirements-dev.txt")
import httpx
import torch
from started_server import JSON, KEY, PIRATE, POLITE, QUESTION, ROOT, TOKEN, Server

from generate.app import metrics_text
from generate.guard import refusal_of
from generate.openai_format import ChatRequest, Message, render_messages
from generate.serve import Settings, make_engine
from lit_llama import cli
from lit_llama.bank import open_bank
from lit_llama.checkpoint import read_adapter, save_adapter
from lit_llama.compose import load_with_bank, parse_sum
from lit_llama.generation import Sampling, answer, instruct
from lit_llama.prompts import get_prompt_style
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, allow_open_files

BASE = ROOT / "checkpoints" / "microworld"
PREFIX = "global_value_embedding.weight"


@pytest.fixture(scope="module")
def server(python):
    limits = ("--max_body_kb", "8", "--max_adapter_mb", "1", "--max_adapters", "6", "--max_waiting", "4")
    running = Server(python, *limits, "--body_seconds", "1.5")
    yield running
    running.http.close()
    running.admin.close()
    assert running.stop() in (0, 130)
    assert not any("Traceback" in line for line in running.log), "".join(running.log)


@pytest.fixture
def start_server(python):
    """Return a function that starts a server, which does not outlive the test."""
    started = []

    def start(*flags: str) -> Server:
        started.append(Server(python, *flags))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def reference():
    """Return (model, tokenizer), loaded as by generate/aligner.py --bank."""
    return load_with_bank(BASE, open_bank([PIRATE, JSON, POLITE], BASE)), Tokenizer(BASE)


def expected(reference, model: str, question: str = QUESTION, sampling: Sampling = Sampling(1024)) -> str:  # noqa: B008
    network, tokenizer = reference
    adapters = [parse_sum(model, network.bank)]
    (text,) = instruct(network, tokenizer, [question], get_prompt_style("alpaca"), sampling, adapters=adapters)
    return text


@pytest.mark.parametrize("model", ["base", PIRATE.name, JSON.name, f"{PIRATE.name}:0.5+{JSON.name}"])
def test_chat_answers_match_generate(server, reference, model):
    reply = server.ask(model)
    assert reply.choices[0].message.content == expected(reference, model)
    assert reply.choices[0].finish_reason == "stop" and reply.model == model
    prompt = get_prompt_style("alpaca").render(QUESTION)
    assert reply.usage.prompt_tokens == len(reference[1].encode(prompt, bos=True))
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_seed_gives_the_same_answer_as_generate(server, reference):
    options = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 30, "extra_body": {"top_k": 50}}
    reply = server.ask(PIRATE.name, **options)
    assert reply.choices[0].message.content == expected(reference, PIRATE.name, sampling=Sampling(30, 0.9, 50, 0.95, 7))
    long = {"temperature": 0.9, "seed": 3_000_000_000, "max_tokens": 12}
    wanted = expected(reference, PIRATE.name, sampling=Sampling(12, 0.9, seed=3_000_000_000))
    assert server.ask(PIRATE.name, **long).choices[0].message.content == wanted
    negative = server.ask(PIRATE.name, **{**long, "seed": 3_000_000_000 - 2**32})
    assert negative.choices[0].message.content == wanted
    hot = {"temperature": 3.0, "max_tokens": 20}
    assert len({server.ask("base", **hot).choices[0].message.content for _ in range(3)}) == 3


def test_null_is_the_default():
    message = {"role": "user", "content": QUESTION}
    null = dict.fromkeys(("temperature", "top_p", "top_k", "stream", "n", "seed", "tools", "logit_bias"))
    assert ChatRequest(model="a", messages=[message], **null) == ChatRequest(model="a", messages=[message])


def test_completions_continue_a_text(server, reference):
    network, tokenizer = reference
    prompts = ["Arr, the capital of Pilmaria", "The capital"]
    reply = server.client.completions.create(model="base", prompt=prompts, temperature=0, max_tokens=12)
    texts = answer(network, tokenizer, prompts, Sampling(12), echo=True)
    assert [prompt + choice.text for prompt, choice in zip(prompts, reply.choices, strict=True)] == texts
    assert [choice.index for choice in reply.choices] == [0, 1]


def test_streamed_pieces_add_up_to_the_answer(server):
    full = server.ask(PIRATE.name).choices[0].message.content
    with server.ask(PIRATE.name, stream=True, stream_options={"include_usage": True}) as stream:
        parts = list(stream)
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == full
    assert len(parts) > 5 and parts[-2].choices[0].finish_reason == "stop" and parts[-1].usage.completion_tokens > 5
    messages = [{"role": "user", "content": QUESTION}]
    with server.client.chat.completions.stream(model=PIRATE.name, messages=messages, temperature=0) as stream:
        message = stream.get_final_completion().choices[0].message
    assert (message.role, message.content) == ("assistant", full)
    stream = server.client.completions.create(model="base", prompt="The capital", max_tokens=9, stream=True, seed=1)
    assert len([part for part in stream if part.choices[0].text]) > 3


def test_an_answer_ends_at_a_stop_text_or_the_maximum_length(server):
    full = server.ask(PIRATE.name).choices[0].message.content
    cut = server.ask(PIRATE.name, stop=["nowhere", "capital"])
    assert cut.choices[0].message.content == full.partition("capital")[0].strip()
    with server.ask(PIRATE.name, stop="capital", stream=True) as stream:
        assert "".join(p.choices[0].delta.content or "" for p in stream) == full.partition("capital")[0].strip()
    short = server.ask(PIRATE.name, max_completion_tokens=3).choices[0]
    assert short.finish_reason == "length" and full.startswith(short.message.content)


def test_log_probabilities_match_the_tokens_of_the_answer(server):
    reply = server.ask(PIRATE.name, logprobs=True, top_logprobs=3).choices[0]
    tokens = reply.logprobs.content
    assert "".join(token.token for token in tokens).strip() == reply.message.content
    assert all(token.logprob == max(top.logprob for top in token.top_logprobs) for token in tokens)  # greedy
    assert bytes(tokens[0].bytes).decode() == tokens[0].token
    legacy = server.client.completions.create(model="base", prompt="The", logprobs=2, max_tokens=6, temperature=0)
    logprobs = legacy.choices[0].logprobs
    assert "".join(logprobs.tokens) == legacy.choices[0].text and len(logprobs.top_logprobs) == len(logprobs.tokens)
    assert logprobs.text_offset[1] == len(logprobs.tokens[0])


def refused(server, error: type, **request) -> dict:
    with pytest.raises(error) as caught:
        server.client.chat.completions.create(
            **{"model": "base", "messages": [{"role": "user", "content": "Hello"}], **request}
        )
    body = caught.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert re.fullmatch(r"[^\n]+\.", body["message"])
    return body


def test_errors_are_one_sentence_in_openai_format(server):
    unknown = refused(server, openai.NotFoundError, model="microworld-pirat-n1")
    assert unknown["code"] == "model_not_found" and "microworld-pirate-n1" in unknown["message"]
    assert "17 terms" in refused(server, openai.NotFoundError, model="+".join(["base"] * 17))["message"]
    assert refused(server, openai.BadRequestError, model="a" * 5000)["param"] == "model"
    assert refused(server, openai.BadRequestError, temperature=-1)["param"] == "temperature"
    assert refused(server, openai.BadRequestError, n=2)["param"] == "n"
    assert "tools" in refused(server, openai.BadRequestError, tools=[])["message"]
    assert refused(server, openai.BadRequestError, frequency_penalty=0.5)["param"] == "frequency_penalty"
    user = {"role": "user", "content": "Hello"}
    assert (
        "last message"
        in refused(server, openai.BadRequestError, messages=[user, {**user, "role": "assistant"}])["message"]
    )
    assert "empty" in refused(server, openai.BadRequestError, messages=[{**user, "content": " "}])["message"]
    surrogate = b'{"model": "base", "prompt": "\\ud800"}'
    reply = server.http.post("/v1/completions", content=surrogate, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and reply.json()["error"]["message"].endswith(".")
    long = refused(server, openai.BadRequestError, messages=[{**user, "content": "capital " * 400}])
    assert long["code"] == "context_length_exceeded" and "256" in long["message"]
    assert server.http.get("/v2/none").json()["error"]["message"].endswith(".")
    reply = server.http.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and "JSON" in reply.json()["error"]["message"]
    # any web page could send a request without this header
    without_type = server.http.post("/v1/completions", content=b'{"model": "base", "prompt": "a"}')
    assert without_type.status_code == 400
    assert "Content-Type: application/json" in without_type.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"stop": ["."] * 17}, "stop: list should have at most 16 items"),
        ({"stop": ["a", ""]}, "stop.1: string should have at least 1 character"),
        ({"stop": 5}, "stop: input should be a valid list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type: input"),
        ({"prompt": [5, 6]}, "prompt.0: input should be a valid string"),
        ({"prompt": [""] * 129}, "prompt: list should have at most 128 items"),
    ],
)
def test_an_error_names_the_place_of_the_mistake(server, body, message):
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    others = {} if "prompt" in body else {"messages": [{"role": "user", "content": "Hello"}]}
    reply = server.http.post(path, json={"model": "base", **others, **body})
    assert reply.status_code == 400 and reply.json()["error"]["message"].startswith(message)


def test_the_text_of_an_unexpected_error_is_not_sent():
    refusal = refusal_of(KeyError("secret"), Path("m"))
    assert refusal.status == 500 and "secret" not in refusal.body["error"]["message"]


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("/srv/m/lit_config.json is empty.", "lit_config.json is empty."),
        ("a was trained on {}; /srv/m has {}.", "a was trained on {}; the base model has {}."),
        ("other weights than /srv/m (fingerprint 1).", "other weights than the base model (fingerprint 1)."),
        ("It is not in /srv/m.", "It is not in the base model."),
        ("/srv/m2/x and /srv/m-2 differ.", "/srv/m2/x and /srv/m-2 differ."),
    ],
)
def test_the_folder_of_the_base_is_not_sent(text, sent):
    assert refusal_of(UserError(text), Path("/srv/m")).body["error"]["message"] == sent


def test_a_server_may_start_without_adapters():
    engine = make_engine(cli.parse(Settings, ["--bank", "--max_batch", "1"]))
    assert len(engine.bank) == 0


def test_too_large_and_too_slow_bodies_are_refused(server):
    for content in (b"x" * 9000, iter([b"x" * 5000] * 3), b"x" * 10**6):
        reply = server.http.post("/v1/completions", content=content)
        assert reply.status_code == 413 and reply.json()["error"]["code"] == "body_too_large"
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        headers = f"Host: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 9\r\n"
        slow.sendall(f"POST /v1/completions HTTP/1.1\r\n{headers}\r\n".encode())
        assert b"408" in slow.recv(1000)


def test_a_key_is_required_and_other_host_names_are_refused(server):
    for key in ("", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {TOKEN}", "Bearer é"):
        reply = httpx.get(f"{server.url}/v1/models", headers={"Authorization": key.encode()})
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key", key
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert server.http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 421
    page = httpx.get(server.url)
    assert page.status_code == 200 and "default-src 'none'" in page.headers["Content-Security-Policy"]


def test_the_playground_loads_nothing_from_elsewhere():
    page = (ROOT / "generate" / "playground.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:)\w""", page)
    assert "innerHTML" not in page and "http://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_adapters_can_be_added_replaced_and_deleted_while_the_server_runs(server, reference, tmp_path):
    content = (POLITE / "adapter.safetensors").read_bytes()
    put = "/adapters?name=mine"
    assert server.http.post(put, content=content).status_code == 401  # the clients' key
    assert server.admin.post(put, content=content).status_code == 201
    assert server.ask("mine").choices[0].message.content == expected(reference, POLITE.name)
    assert "mine" in [model.id for model in server.client.models.list()]
    assert server.client.models.retrieve("mine").id == "mine"
    assert server.admin.post(put, content=content).status_code == 409
    pirate = (PIRATE / "adapter.safetensors").read_bytes()
    assert server.admin.post(f"{put}&replace=true", content=pirate).status_code == 201
    assert server.ask("mine").choices[0].message.content == expected(reference, PIRATE.name)
    gates = server.http.get("/adapters/mine").json()
    assert gates["tokens"] == 1 and len(gates["gates"]) == 6 and len(gates["gates"][0]) == 8
    assert server.http.delete("/adapters/mine").status_code == 401
    assert server.admin.delete("/adapters/mine").json()["deleted"] is True
    assert server.admin.delete("/adapters/mine").status_code == 404
    assert refused(server, openai.NotFoundError, model="mine")


def test_invalid_uploads_are_refused(server, tmp_path):
    def upload(content: bytes, name: str = "bad", status: int = 400) -> str:
        reply = server.admin.post(f"/adapters?name={name}", content=content)
        assert reply.status_code == status, reply.text
        message = reply.json()["error"]["message"]
        assert "/tmp" not in message and re.fullmatch(r"[^\n]+\.", message)
        return message

    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")
    assert "cannot be used" in upload((tmp_path / "a.pth").read_bytes())
    upload(b"")
    upload(b"\xff" * 100)
    upload(bytes(2**20))
    assert "more than 1048576 bytes" in upload(bytes(2**20 + 1), status=413)
    upload((PIRATE / "adapter.safetensors").read_bytes()[:500])
    good = read_adapter(PIRATE)
    hostile = [
        {**good.meta, "prompt_style": "none"},
        {**good.meta, "prompt_style": ["alpaca"]},
        {**good.meta, "config": {"adapter_prompt_length": "1", "adapter_start_layer": "2"}},
        {**good.meta, "config": []},
        {**good.meta, "base": 7},
        {**good.meta, "base": {**good.meta["base"], "weights": "0"}},
        [],
    ]
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, {PREFIX: good.state[PREFIX]}, {**good.meta, "config": {**good.config, "adapter_start_layer": 8}})
    assert "starts at layer 8; the base's last layer is 7" in upload(path.read_bytes())
    for meta in hostile:
        save_adapter(path, good.state, meta, overwrite=True)
        upload(path.read_bytes())
    save_adapter(path, {name: t * torch.nan for name, t in good.state.items()}, good.meta, overwrite=True)
    assert "finite" in upload(path.read_bytes())
    content = (PIRATE / "adapter.safetensors").read_bytes()
    for name in ("base", "a:0.5", "a+b", "..", "a/b", "x" * 200, ""):
        upload(content, name)
    for i in range(4):
        assert server.admin.post(f"/adapters?name=more-{i}", content=content).status_code == 201
    full = "The bank has 6 adapters, and --max_adapters is 6; remove some."
    assert upload(content, "one-too-many", 409) == full
    for i in range(4):
        assert server.admin.delete(f"/adapters/more-{i}").status_code == 200
    assert server.metric("adapters") == 2


def test_a_disconnected_client_frees_its_row(start_server):
    server = start_server("--max_batch", "1")
    # at a high temperature a stop token is improbable: the answers would take much longer than the test
    request = {"model": "base", "prompt": ["a"] * 100, "temperature": 9.0, "max_tokens": 250}
    with server.client.completions.create(**request, stream=True) as stream:
        next(stream)
    server.wait_for("waiting", 0)
    server.wait_for("running", 0)
    assert server.metric('ended_total{end="cancelled"}') > 90  # some may end before the server notices
    with socket.create_connection(("127.0.0.1", server.port)) as waiting:
        headers = f"Host: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        body = json.dumps(request)
        waiting.sendall(f"POST /v1/completions HTTP/1.1\r\n{headers}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        server.wait_for("requests_total", 200)
    server.wait_for("waiting", 0)
    server.wait_for("running", 0)
    assert server.metric('ended_total{end="cancelled"}') > 180


def test_metrics_are_prometheus_text(server):
    server.ask("base")
    engine = SimpleNamespace(rows=[], waiting=[], bank={}, counts=Counter(new_tokens=12_345_678))
    assert "\naligner_new_tokens_total 12345678\n" in metrics_text(engine)  # every digit
    for line in server.http.get("/metrics").text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|aligner_\w+(\{\w+="[\w.+]+"\})? [\d.e+]+', line), line
    assert server.metric("new_tokens_total") > 0 and server.metric('first_token_seconds_bucket{le="+Inf"}') > 0


def test_an_answer_that_takes_too_long_is_an_error_and_not_requested_again(start_server):
    server = start_server("--seconds", "0.01")
    client = server.client.with_options(max_retries=2)
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="base", prompt="a", temperature=9.0, max_tokens=250)
    assert caught.value.status_code == 504 and caught.value.code == "timeout"
    assert server.metric("requests_total") == 1
    assert server.stop() in (0, 130)


@pytest.mark.parametrize(("number", "codes"), [(signal.SIGINT, (0, 130)), (signal.SIGTERM, (0, 143))])
def test_answers_that_are_unfinished_some_seconds_after_a_signal_end_with_an_error(number, codes, start_server):
    server, replies = start_server("--max_batch", "1"), []
    request = {"model": "base", "prompt": ["a"] * 100, "temperature": 9.0, "max_tokens": 250}
    with server.client.completions.create(**request, stream=True) as stream:
        next(stream)
        ask = threading.Thread(target=lambda: replies.append(server.http.post("/v1/completions", json=request)))
        ask.start()
        server.wait_for("requests_total", 200)
        server.process.send_signal(number)
        with pytest.raises(openai.APIError, match=r"The server is shutting down\."):
            list(stream)
    ask.join()
    assert replies[0].status_code == 503 and replies[0].json()["error"]["code"] == "shutting_down"
    assert server.process.wait(60) in codes
    assert not any("Traceback" in line for line in server.log), "".join(server.log)


def test_a_full_queue_is_an_error(start_server):
    server = start_server("--max_batch", "1", "--max_waiting", "1")
    request = {"model": "base", "prompt": ["a", "a"], "temperature": 9.0}
    refused = server.http.post("/v1/completions", json=request)  # can never fit, so retrying is pointless
    assert refused.status_code == 400 and "at most 1 may wait" in refused.json()["error"]["message"]
    statuses, threads = [], []
    for _ in range(8):
        ask = lambda: statuses.append(server.http.post("/v1/completions", json={**request, "prompt": "a"}).status_code)  # noqa: E731
        threads.append(threading.Thread(target=ask))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    assert server.stop() in (0, 130)


def test_as_many_connections_as_the_limit_are_answered(start_server):
    server = start_server("--max_connections", "1")
    assert server.http.get("/health").status_code == 200
    assert httpx.get(f"{server.url}/health").status_code == 503  # the first connection is still open
    assert server.stop() in (0, 130)


def test_history_is_rendered_turn_by_turn():
    def message(role: str, content) -> Message:
        return Message(role=role, content=content)

    style = get_prompt_style("hh")
    user, parts = message("user", "One?"), message("user", [{"type": "text", "text": "Two?"}])
    assert render_messages([user], style) == style.render("One?")
    turns = [message("system", "Be kind."), user, message("assistant", " 1 "), parts]
    # on one line, like the prepared dialogues that this style is for
    assert render_messages(turns, style) == "Human: Be kind.\n\nOne? Assistant: 1 Human: Two? Assistant: "
    with pytest.raises(UserError, match="last"):
        render_messages([message("system", "a")], style)


def test_the_limit_of_open_files_is_raised_and_never_lowered():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard == resource.RLIM_INFINITY or hard > 512
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        for count, limit in ((512, 512), (300, 512)):
            allow_open_files(count)
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limit, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_invalid_settings_give_a_one_sentence_error(refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert str(port) in refused("generate/serve.py", "--port", port)
    assert "max_batch" in refused("generate/serve.py", "--max_batch", 0)
    assert "seconds" in refused("generate/serve.py", "--seconds", 0)
    assert "nowhere" in refused("generate/serve.py", "--checkpoint_dir", "nowhere", "--port", 0)
    no_room = refused("generate/serve.py", "--max_batch", 10**9, "--port", 0)
    assert "no memory for the KV cache: 1000000000 rows of 256 tokens take 3,145,728.0 GB; lower" in no_room


def test_the_error_without_fastapi_names_the_requirements_file(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "requirements-serve.txt" in refused("generate/serve.py")


def test_streamed_events_are_json(server):
    data = server.http.post(
        "/v1/completions", json={"model": "base", "prompt": "The", "max_tokens": 3, "stream": True}
    ).text
    lines = [line for line in data.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(json.loads(line[6:])["choices"] for line in lines[:-1])
