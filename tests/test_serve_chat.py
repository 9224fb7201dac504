"""The server with an instruct model: conversations from OpenAI's client, rendered by the checkpoint's template."""

import resource
import shutil
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="needs requirements-serve.txt")
openai = pytest.importorskip("openai", reason="needs requirements-dev.txt")
import torch
from chat_models import write_model
from starlette.testclient import TestClient

from generate.app import make_app
from generate.engine import Engine
from generate.openai_format import Message, render_messages
from generate.serve import Settings
from lit_llama.bank import make_bank
from lit_llama.checkpoint import AdapterFile, save_base
from lit_llama.compose import load_with_bank
from lit_llama.generation import Sampling, answer
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.prompts import get_prompt_style
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError


def adapter(style: str, seed: int) -> AdapterFile:
    generator = torch.Generator().manual_seed(seed)
    state = {"global_value_embedding.weight": torch.randn(1, 16, generator=generator)}
    state |= {f"transformer.h.{i}.attn.gating_factor": torch.ones(1, 2, 1, 1) for i in (1, 2)}
    config = {"adapter_prompt_length": 1, "adapter_start_layer": 1}
    return AdapterFile(state, {"method": "aligner", "config": config, "prompt_style": style}, style)


@pytest.fixture(scope="module", params=["chatml", "mistral"])
def served(request, tmp_path_factory, tokenizer_path):
    folder = write_model(tmp_path_factory.mktemp("model") / "m", request.param, tokenizer_path)
    tokenizer = Tokenizer(folder)
    config = LLaMAConfig(
        block_size=512, vocab_size=tokenizer.vocab_size, n_layer=3, n_head=2, n_embd=16, intermediate_size=24
    )
    network, generator = LLaMA(config), torch.Generator().manual_seed(0)
    state = {name: 0.3 * torch.randn(p.shape, generator=generator) for name, p in network.named_parameters()}
    save_base(folder, config, state)
    styles = {"plain-one": "alpaca", "chat-one": "chat", "bad-one": "chat:nonsense=1"}
    bank = make_bank(folder, [(name, adapter(style, i)) for i, (name, style) in enumerate(styles.items(), 1)])
    model = load_with_bank(folder, bank)
    app = make_app(Engine(model, tokenizer, max_batch=4), Settings(allowed_hosts=("*",)))
    with TestClient(app) as http:
        client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http)
        yield client, load_with_bank(folder, bank), tokenizer, request.param


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_conversations_are_rendered_by_the_template(served):
    client, model, tokenizer, _ = served
    chat, alpaca = get_prompt_style("chat", tokenizer), get_prompt_style("alpaca")
    question = [message("user", "Hello <|im_end|> </s> you")]
    turns = [message("system", "Be kind."), *question, message("assistant", "Yes?"), message("user", "And the dog?")]
    for name, style, messages in (
        ("base", chat, question),
        ("base", chat, turns),
        ("chat-one", chat, turns),
        ("plain-one", alpaca, question),
    ):
        reply = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=8)
        prompt = style.render_messages(messages)
        assert reply.usage.prompt_tokens == len(tokenizer.encode(prompt, bos=True))
        rows = [() if name == "base" else ((name, 1.0),)]
        (expected,) = answer(model, tokenizer, [prompt], Sampling(8), style.stop, adapters=rows)
        assert reply.choices[0].message.content == expected


def test_a_request_that_fails_to_join_gets_status_500_and_one_traceback(served, monkeypatch, capfd):
    client = served[0]
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_prefill", lambda *args: 1 / 0)
        with pytest.raises(openai.InternalServerError) as error:  # the test client raises what the server would log
            client.chat.completions.create(model="base", messages=[message("user", "Hello")])
    assert error.value.status_code == 500 and error.value.code == "server_error"
    assert "its log says why" in error.value.body["message"]
    assert capfd.readouterr().err.count("Traceback") == 1


def test_a_chat_is_not_answered_by_an_adapter_of_another_style(served, monkeypatch):
    client, submit, engines = served[0], Engine.submit, []

    def replace_and_submit(engine: Engine, jobs: list) -> None:
        with engine.changed:
            engine.bank.swap("plain-one", adapter("chat", 9))
        submit(engine, jobs)
        engines.append(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "submit", replace_and_submit)
        with pytest.raises(openai.BadRequestError, match="now has another prompt style"):
            client.chat.completions.create(model="plain-one", messages=[message("user", "Hi")], max_tokens=1)
    with engines[0].changed:
        engines[0].bank.swap("plain-one", adapter("alpaca", 1))


def test_rendering_does_not_limit_the_memory_of_the_engine(served, monkeypatch):
    """The limit would be that of the process, so the engine could not allocate meanwhile."""
    limits, set_limit = [], resource.setrlimit
    monkeypatch.setattr(resource, "setrlimit", lambda *args: limits.append(args) or set_limit(*args))
    client, _, tokenizer, _ = served
    for name in ("base", "chat-one"):
        client.chat.completions.create(model=name, messages=[message("user", "Hi")], max_tokens=1)
    assert limits == []
    Tokenizer(tokenizer.path.parent).template.render([message("user", "Hi")])
    assert limits != []  # elsewhere it is limited


@pytest.mark.skipif(sys.platform != "linux", reason="memory can be limited only on Linux")
def test_a_template_that_needs_too_much_memory_is_refused_at_the_start(served, tmp_path):
    folder = shutil.copytree(served[2].path.parent, tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{{ 'x'.ljust(10 ** 10) }}")
    engine = SimpleNamespace(tokenizer=Tokenizer(folder))
    for style in (None, "chat"):
        with pytest.raises(UserError, match=r"chat_template\.jinja cannot be used \(MemoryError\)"):
            make_app(engine, Settings(prompt_style=style))
    assert make_app(engine, Settings(prompt_style="alpaca"))


def test_a_conversation_that_the_template_refuses_gives_a_one_sentence_error(served):
    client, _, _, kind = served
    two_questions = [message("user", "a"), message("user", "b")]
    if kind == "chatml":
        assert client.chat.completions.create(model="base", messages=two_questions, max_tokens=2).usage.prompt_tokens
        return
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="base", messages=two_questions, max_tokens=2)
    sentence = error.value.body["message"]
    assert "refuses the conversation: Conversation roles must alternate" in sentence and "\n" not in sentence


def test_an_error_of_the_template_names_its_file_without_the_folder(served):
    client, _, tokenizer, _ = served
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="bad-one", messages=[message("user", "Hi")])
    sentence = error.value.body["message"]
    assert "has no variable 'nonsense'" in sentence
    assert tokenizer.template.path.name in sentence and str(tokenizer.path.parent) not in sentence


def test_a_template_may_read_the_names_of_messages(served, tmp_path):
    folder = shutil.copytree(served[2].path.parent, tmp_path / "m")
    source = "{% for m in messages %}{{ m.name or 'nobody' }}: {{ m.content }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(source)
    messages = [Message(role="user", name="Ann", content="Hi"), Message(role="assistant", content="Yes?")]
    messages.append(Message(role="user", name="", content="Bye"))
    prompt = render_messages(messages, get_prompt_style("chat", Tokenizer(folder)))
    assert prompt == "Ann: Hi\nnobody: Yes?\nnobody: Bye\n"


def test_developer_messages_are_treated_as_system_messages(served):
    client, _, tokenizer, _ = served
    lengths = set()
    for role in ("system", "developer"):
        messages = [message(role, "Be kind."), message("user", "Hi")]
        lengths.add(client.chat.completions.create(model="base", messages=messages, max_tokens=1).usage.prompt_tokens)
    assert lengths == {len(tokenizer.encode(get_prompt_style("chat", tokenizer).render("Hi", system="Be kind.")))}
