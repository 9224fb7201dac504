"""Chat templates: agreement with transformers, special tokens in messages, and templates that misbehave."""

import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
from chat_models import GENERATED, SPECIAL, TEMPLATES, write_model
from hypothesis import given
from hypothesis import strategies as st

from lit_llama import sandbox
from lit_llama.chat_template import GUARD, ChatTemplate, ChatText, Interrupter, Unstable
from lit_llama.config import LLaMAConfig
from lit_llama.huggingface.tokenizer_files import write_hf_tokenizer
from lit_llama.prompts import get_prompt_style, template_variables
from lit_llama.tokenizer import HuggingFace, Tokenizer
from lit_llama.utils import UserError

KINDS = [*TEMPLATES, "mistral-first", "gemma-first"]
SYSTEM = {"role": "system", "content": "Be kind, and short."}
TURNS = [
    {"role": "user", "content": "Hello! How are you today?"},
    {"role": "assistant", "content": "Fine, thanks. And you?"},
    {"role": "user", "content": "The cat sat.\n\n  Twice: naïve 😀 a < b | c"},
    {"role": "assistant", "content": "def f():\n    return 1"},
    {"role": "user", "content": "And the dog?"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer_path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: write_model(root / kind, kind, tokenizer_path) for kind in KINDS}


def transformers_tokenizer(folder: Path):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def conversations(kind: str) -> list[list[dict]]:
    plain = [TURNS[:1], TURNS[:3], TURNS]
    return plain if kind.startswith(("mistral", "gemma")) else [*plain, [SYSTEM, *TURNS], [SYSTEM, *TURNS[:1]]]


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_ids_match_transformers(kind, folders):
    tokenizer, reference = Tokenizer(folders[kind]), transformers_tokenizer(folders[kind])
    for messages in conversations(kind):
        for turns, add_prompt in ((messages, True), (messages[:-1], False)):
            if not turns:
                continue
            text = tokenizer.template.render(turns, generation_prompt=add_prompt)
            assert str(text) == reference.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_prompt)
            ids = reference.apply_chat_template(turns, add_generation_prompt=add_prompt, return_dict=False)
            assert tokenizer.encode(text, bos=True, eos=True) == ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_guard_in_the_text_does_not_change_the_ids(kind, folders):
    """A text that contains GUARD takes a second encoding path; the ids must not depend on it."""
    tokenizer = Tokenizer(folders[kind])
    for messages in conversations(kind):
        text = tokenizer.template.render(messages)
        guarded = ChatText(text.replace("y", f"y{GUARD}"))
        assert GUARD in guarded and tokenizer.encode(guarded) == tokenizer.encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_a_message_stay_text(kind, folders):
    tokenizer = Tokenizer(folders[kind])
    control = tokenizer.chat_engine.control
    plain = tokenizer.encode(tokenizer.template.render([{"role": "user", "content": "a b"}]))
    n_special = sum(i in control.values() for i in plain)
    for special in control:
        question = f"a {special}x{special}{special} b"
        ids = tokenizer.encode(tokenizer.template.render([{"role": "user", "content": question}]))
        assert sum(i in control.values() for i in ids) == n_special, special
        if special != "<unk>":  # an unknown token has no text
            assert question in tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["llama3", "chatml", "mistral-first", "gemma-first"])
def test_special_tokens_in_messages_are_text_as_in_transformers(kind, folders):
    """transformers encodes such a token separately from the rest of the message: ids may differ, texts do not."""
    tokenizer, reference = Tokenizer(folders[kind]), transformers_tokenizer(folders[kind])
    for special in SPECIAL[kind.partition("-")[0]]:
        messages = [{"role": "user", "content": f"a {special} b"}]
        ids = tokenizer.encode(tokenizer.template.render(messages))
        sanitized = reference.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
        )
        special_ids = set(tokenizer.chat_engine.control.values())
        assert [i for i in ids if i in special_ids] == [i for i in sanitized if i in special_ids]
        assert tokenizer.decode(ids) == tokenizer.decode(sanitized)


pieces = st.lists(st.sampled_from(["<|", "eot_id", "|>", "<|eot_id|>", "<|im_", "end|>", "<", "|", ">", " ", "\n", "a",
                                   "<|end_header_id|>", "</s>", "<s", "</", "s>", GUARD]), max_size=8)  # fmt: skip


@given(parts=st.lists(pieces.map("".join), min_size=1, max_size=3))
@pytest.mark.parametrize("kind", ["llama3", "mistral", "mistral-first"])
def test_no_combination_of_pieces_becomes_a_special_token(kind, parts, folders):
    """The end of a message and the text after it may spell out a special token."""
    tokenizer = OPEN.setdefault(kind, Tokenizer(folders[kind]))
    messages, plain = [], []
    for i, part in enumerate(parts):
        role = ("user", "assistant")[i % 2]
        messages.append({"role": role, "content": part})
        plain.append({"role": role, "content": "x"})
    ids, expected = (tokenizer.encode(tokenizer.template.render(m, generation_prompt=False)) for m in (messages, plain))
    special = set(tokenizer.chat_engine.control.values())
    assert [i for i in ids if i in special] == [i for i in expected if i in special]


OPEN: dict[str, Tokenizer] = {}


def test_special_tokens_in_keys_stay_text():
    protect = Interrupter(["<|im_end|>", "<|im_start|>"])
    protected = protect({"role": "tool", "arguments": {"<|im_end|>": "<|im_end|>", "x": 1}})
    assert list(protected) == ["role", "arguments"]  # under their names
    (key, other), values = protected["arguments"], [*protected["arguments"].values()]
    assert "<|im_end|>" not in key and key.replace(GUARD, "") == "<|im_end|>" and other == "x"
    assert values[0].replace(GUARD, "") == "<|im_end|>" and "<|im_end|>" not in values[0] and values[1] == 1


def test_tokens_that_a_model_may_write_stay_text_in_questions(folders):
    """For example <think>: not a special token, but never split, and also written by the template."""
    tokenizer = Tokenizer(folders["thinking"])
    think = {tokenizer.engine.engine.token_to_id(text) for text in ("<think>", "</think>")}
    thought = "<think>\nhm\n</think>\n\nYes."

    def count(question: str, answer: str) -> int:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = tokenizer.encode(tokenizer.template.render(messages, generation_prompt=False))
        assert question in tokenizer.decode(ids)
        return sum(i in think for i in ids)

    assert count("a </think> b", "Yes.") == 2 and count("a </think><|im_end|>", thought) == 2
    assert count("a", thought) == 2 and count("a", "<|im_end|> " + thought) == 2


@pytest.mark.parametrize("scheme", ["sentencepiece", "added"])
def test_a_sentencepiece_model_without_tokenizer_json(scheme, folders, tokenizer_path, tmp_path):
    """Control pieces, listed pieces and added tokens are special; ids are as with tokenizer.json."""
    folder = tmp_path / "m"
    folder.mkdir()
    shutil.copy(tokenizer_path, folder)
    template = TEMPLATES["mistral" if scheme == "sentencepiece" else "chatml"]
    config = {"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"}
    size = Tokenizer(tokenizer_path).vocab_size
    if scheme == "added":
        added = {str(size + i): {"content": text, "special": True} for i, text in enumerate(SPECIAL["chatml"][1:])}
        config |= {"added_tokens_decoder": added, "additional_special_tokens": ["the", "<|im_end|>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(folder)
    messages = [*TURNS[:2], {"role": "user", "content": "a </s> <s> <|im_end|> the b"}]
    ids = tokenizer.encode(tokenizer.template.render(messages))
    if scheme == "sentencepiece":
        both = Tokenizer(folders["mistral"])
        assert both.path.name == "tokenizer.model" and both.encode(both.template.render(messages)) == ids
        assert [i for i in ids if i in (1, 2)] == [1, 2]
    else:
        assert tokenizer.stop_ids[:2] == (2, size + 1) and ids.count(size) == 5 and ids.count(size + 1) == 4
        assert "a </s> <s> <|im_end|> the b" in tokenizer.decode(ids).replace("\u2581", " ")
        assert write_read(tokenizer, tmp_path / "hf").encode(tokenizer.template.render(messages)) == ids


def test_added_tokens_that_are_not_special(base_dir, tmp_path):
    """For example ChatML's, added in a fine-tuning: not special, but never split where the template or a model writes
    them.
    """
    shutil.copytree(base_dir, folder := tmp_path / "m")
    size = LLaMAConfig.from_json(folder / "lit_config.json").vocab_size
    names = ["<|im_start|>", "<|im_end|>", "<tool_call>"]
    added = {str(size + i): {"content": text, "special": False} for i, text in enumerate(names)}
    template = TEMPLATES["chatml"].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    config = {"chat_template": template, "bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    about = json.loads((folder / "lit_config.json").read_text())
    (folder / "lit_config.json").write_text(json.dumps({**about, "padded_vocab_size": size + 64}))
    tokenizer = Tokenizer(folder)
    assert tokenizer.vocab_size == size + 3 and size + 1 in tokenizer.stop_ids
    messages = [{"role": "user", "content": "a <|im_end|>"}, {"role": "assistant", "content": "<tool_call> the cat"}]
    text = tokenizer.template.render(messages, generation_prompt=False)
    ids = tokenizer.encode(text)
    assert [i for i in ids if i >= size] == [size, size + 1] * 2 + [size, size + 2, size + 1]
    assert "<|im_start|> assistant\n<tool_call>  the cat<|im_end|>" in tokenizer.decode(ids)
    assert max(tokenizer.encode("a <tool_call>")) < size  # text, as before
    (folder / "lit_config.json").write_text(json.dumps({**about, "padded_vocab_size": size + 2}))
    smaller = Tokenizer(folder)  # for a model that lacks the last token
    assert smaller.vocab_size == size + 2 and size + 2 not in smaller.encode(text)
    assert "<tool_call> the cat<|im_end|>" in smaller.decode(smaller.encode(text))
    words = "a <tool_call> the cat"
    assert smaller.engine.encode_chat(words) == smaller.engine.encode(words)
    (folder / "lit_config.json").write_text(json.dumps({**about, "padded_vocab_size": size + 64}))
    written = write_read(tokenizer, tmp_path / "hf")
    assert written.chat_engine.added == tokenizer.engine.added and written.encode(text) == ids
    assert written.decode(ids) == tokenizer.decode(ids)
    shutil.copy(tmp_path / "hf/tokenizer.json", folder)  # a folder with both files, only one of which lists the tokens
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": None}))
    both = Tokenizer(folder)
    assert both.path.name == "tokenizer.model" and both.vocab_size == size + 3 and both.encode(text) == ids
    (folder / "lit_config.json").write_text(json.dumps({**about, "padded_vocab_size": size + 2}))
    both = pickle.loads(pickle.dumps(Tokenizer(folder)))
    assert both.encode(text) == smaller.encode(text) and both.encode(ChatText(words)) == smaller.encode(words)


def test_tools_may_have_their_own_template(base_dir, tmp_path):
    """A list of templates, as in transformers, which reads the folder of a merged model."""
    shutil.copytree(base_dir, folder := tmp_path / "m")
    sources = {"default": TEMPLATES["mistral"], "tool_use": "{{ tools | tojson }}{{ mood }}" + TEMPLATES["mistral"]}
    config = {"bos_token": "<s>", "eos_token": "</s>",
              "chat_template": [{"name": name, "template": sources[name]} for name in reversed(sources)]}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    template, tools = Tokenizer(folder).template, [{"name": "weather"}]
    written = write_read(Tokenizer(folder), tmp_path / "hf").template
    reference = transformers_tokenizer(tmp_path / "hf")
    for listed in (None, tools):
        expected = reference.apply_chat_template(TURNS[:1], tools=listed, tokenize=False, add_generation_prompt=True)
        assert template.render(TURNS[:1], tools=listed) == expected
        assert written.render(TURNS[:1], tools=listed) == expected
    assert '"weather"' in expected and template.sha256 == written.sha256
    assert "glad" in template.with_variables({"mood": "glad"}).render(TURNS[:1], tools=tools)
    config["chat_template"][0]["template"] += " "
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(folder).template.sha256 != template.sha256


def test_ids_of_a_written_folder_match_transformers(folders, tokenizer_path, tmp_path):
    """LlamaTokenizer of transformers 5 ignores the normalizer of tokenizer.json."""
    source = write_model(tmp_path / "m", "mistral", tokenizer_path, tokenizer_class="LlamaTokenizer")
    (tmp_path / "hf").mkdir()
    write_hf_tokenizer(tmp_path / "hf", Tokenizer(source), block_size=64)
    tokenizer = Tokenizer(source)
    ids = tokenizer.encode(tokenizer.template.render(TURNS))
    assert ids != transformers_ids(source) and ids == transformers_ids(tmp_path / "hf")
    for text in ("the cat", " the  cat\n"):
        assert transformers_tokenizer(tmp_path / "hf")(text)["input_ids"] == tokenizer.encode(text, bos=True)


def transformers_ids(folder: Path) -> list[int]:
    return transformers_tokenizer(folder).apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)


def write_read(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """Write a tokenizer in the format of transformers and return the tokenizer read back."""
    folder.mkdir()
    write_hf_tokenizer(folder, tokenizer, block_size=64)
    (folder / "tokenizer.model").unlink()
    return Tokenizer(folder)


def test_texts_that_a_template_joins_do_not_become_special_tokens(folders):
    tokenizer = Tokenizer(folders["llama3"])
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools[0].name }}{{ '_id|>' }}"
    template = ChatTemplate({"default": source}, Path("t"), {}, tokenizer.chat_engine.control)
    messages = [{"role": "user", "content": "<|eot"}, {"role": "user", "content": "_id|>"}]
    ids = tokenizer.encode(template.render(messages, tools=[{"name": "<|eot"}]))
    assert not set(ids) & set(tokenizer.chat_engine.control.values())
    assert tokenizer.decode(ids) == "<|eot_id|><|eot_id|>"


def test_stop_ids_are_eos_the_listed_tokens_and_the_end_of_turn_token(folders, tmp_path):
    for kind, end in (("llama3", "<|eot_id|>"), ("chatml", "<|im_end|>"), ("gemma", "<end_of_turn>"),
                      ("mistral", "</s>"), ("thinking", "<|im_end|>")):  # fmt: skip
        tokenizer = Tokenizer(folders[kind])
        assert tokenizer.template.end_of_turn == end
        assert tokenizer.chat_engine.control[end] in tokenizer.stop_ids
    shutil.copytree(folders["llama3"], tmp_path / "listed")
    (tmp_path / "listed" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert {7, 9, Tokenizer(folders["llama3"]).eos_id} < set(Tokenizer(tmp_path / "listed").stop_ids)


def test_an_unsupported_system_message_is_prepended_to_the_first_question(folders):
    for kind in ("gemma", "mistral"):
        template = Tokenizer(folders[kind]).template
        merged = {"role": "user", "content": f"{SYSTEM['content']}\n\n{TURNS[0]['content']}"}
        assert template.render([SYSTEM, *TURNS]) == template.render([merged, *TURNS[1:]])
        blank, other = {"role": "system", "content": " "}, {"role": "system", "content": "Hi."}
        assert template.render([blank, *TURNS]) == template.render(TURNS)
        merged["content"] = f"{SYSTEM['content']}\n\nHi.\n\n{TURNS[0]['content']}"
        assert template.render([SYSTEM, other, *TURNS]) == template.render([merged, *TURNS[1:]])


def test_the_chat_style_renders_instructions_and_conversations(folders):
    style = get_prompt_style("chat", folders["chatml"])
    prompt = style.render("Add.", "1 2", "Be kind.")
    assert prompt == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nAdd.\n1 2<|im_end|>\n<|im_start|>assistant\n"
    )
    assert style.reply(prompt, " 3 ") == "3<|im_end|>" and style.reply(prompt, " ") == ""
    assert (prompt + style.reply(prompt, "3")) == prompt + ChatText("3<|im_end|>")
    ids = Tokenizer(folders["chatml"]).encode(prompt + "<|im_end|>")  # text appended to a prompt stays text
    assert ids[-1] not in Tokenizer(folders["chatml"]).stop_ids
    for empty in ("", " \n"):
        with pytest.raises(UserError, match="The prompt is empty"):
            style.render(empty)
    with pytest.raises(UserError, match="The last message must be the user's"):
        style.render_messages(TURNS[:2])
    assert style.about == {"prompt_style": "chat", "chat_template_sha256": style.chat.sha256}


def test_tools_and_other_fields_reach_the_template(folders):
    template = Tokenizer(folders["llama3"]).template
    tools = [{"type": "function", "function": {"name": "add", "description": "<b> & 'c' <|eot_id|>"}}]
    text = template.render(TURNS[:1], tools=tools)
    assert text.replace(GUARD, "") == transformers_tokenizer(folders["llama3"]).apply_chat_template(
        TURNS[:1], tools=tools, tokenize=False, add_generation_prompt=True
    )
    thinking = Tokenizer(folders["thinking"]).template
    answer = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    assert "<think>\n2 and 2\n</think>\n\n4<|im_end|>" in thinking.render([TURNS[0], answer], generation_prompt=False)


def test_template_variables_are_part_of_the_style_name(folders):
    style = get_prompt_style("chat:enable_thinking=false", folders["thinking"])
    prompt = style.render("Hi", system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert str(prompt) == transformers_tokenizer(folders["thinking"]).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert prompt.endswith("<think>\n\n</think>\n\n") and style.reply(prompt, "Hello.") == "Hello.<|im_end|>"
    assert style.about == {"prompt_style": "chat:enable_thinking=false", "chat_template_sha256": style.chat.sha256}
    assert pickle.loads(pickle.dumps(style)).render("Hi", system="Be brief.") == prompt
    assert get_prompt_style("chat", folders["thinking"]).render("Hi").endswith("assistant\n")


def test_variable_values_are_parsed(tmp_path):
    source = "{% if a is not defined %}{% set a = 1 %}{% endif %}{{ [a, b, c, d, e] }}{{ raise_exception }}"
    template = ChatTemplate({"default": source}, tmp_path / "chat_template.jinja", {}, [])
    values = template_variables("chat:a=False,b=null,c=1.5,d=low,e=[1]")
    assert values == {"a": False, "b": None, "c": 1.5, "d": "low", "e": "[1]"}
    assert template.with_variables(values).render(TURNS[:1]).startswith("[False, None, 1.5, 'low', '[1]']")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("chat:enable_thinkin=false", "has no variable 'enable_thinkin'; did you mean enable_thinking?"),
        ("chat:messages=1", "has no variable 'messages'"),
        ("chat:raise_exception=1", "has no variable 'raise_exception'"),
        ("chat:", "The prompt style 'chat:' is not of the form chat:NAME=VALUE,NAME=VALUE"),
        ("chat:thinking", "'chat:thinking' is not of the form"),
        ("chat:enable_thinking=1,enable_thinking=2", "VALUE, each name once."),
        ("alpaca:enable_thinking=false", "There is no prompt style 'alpaca:enable_thinking=false'; choose from"),
    ],
)
def test_a_variable_that_cannot_be_set_gives_a_one_sentence_error(name, sentence, folders):
    with pytest.raises(UserError, match=re.escape(sentence)):
        get_prompt_style(name, folders["thinking"])


# == spans of answers ==


@pytest.mark.parametrize("kind", [*GENERATED, "mistral-first"])
def test_answer_spans_cover_what_the_template_marks_as_generated(kind, folders):
    """Compare with transformers' mask of answer tokens, which it derives from the tags in the template."""
    tokenizer, reference = Tokenizer(folders[kind]), transformers_tokenizer(folders[kind])
    messages = TURNS[:4]
    text, spans = tokenizer.template.answer_spans(messages)
    ids = tokenizer.encode(text)
    labels = set()
    for start, end in spans:
        first, last = (len(tokenizer.encode(text.part(0, n))) for n in (start, end))
        labels |= set(range(first, last))
    marked = reference.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert ids == marked["input_ids"] and len(spans) == 2
    assert labels == {i for i, is_generated in enumerate(marked["assistant_masks"]) if is_generated}
    assert tokenizer.template.answer_spans(messages, only_last=True)[1] == spans[1:]


def test_an_answer_span_includes_the_end_of_turn_token(folders):
    for kind, end_of_turn in (("llama3", "<|eot_id|>"), ("chatml", "<|im_end|>"), ("gemma", "<end_of_turn>")):
        text, spans = Tokenizer(folders[kind]).template.answer_spans(TURNS[:4])
        assert [text[start:end] for start, end in spans] == [f"{m['content']}{end_of_turn}" for m in TURNS[1:4:2]]
    text, ((start, end), _) = Tokenizer(folders["mistral"]).template.answer_spans(TURNS[:4])
    assert text[start:end] == " Fine, thanks. And you?</s>"


def test_a_template_that_drops_earlier_thinking_raises_unstable(folders):
    template = Tokenizer(folders["thinking"]).template
    with pytest.raises(Unstable, match="renders an earlier answer differently from the last one"):
        template.answer_spans(TURNS[:4])
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}
    text, ((start, end),) = template.answer_spans([*TURNS[:3], thought], only_last=True)
    assert text[start:end] == "<think>\nhm\n</think>\n\nYes.<|im_end|>"
    assert text[:start] == template.render(TURNS[:3])


def test_a_generation_prompt_that_finished_answers_lack_gives_a_one_sentence_error():
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    source += "{% if add_generation_prompt %}<assistant><think>{% endif %}"
    with pytest.raises(UserError, match="begins a finished answer differently") as error:
        ChatTemplate({"default": source}, Path("t.jinja"), {}, []).answer_spans(TURNS[:2])
    assert "\n" not in str(error.value)


# == templates that misbehave ==

HOSTILE = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{{ raise_exception.__globals__.x }}": "SecurityError",
    "{{ (messages|attr('__class__')) ~ x.y }}": "UndefinedError",
    "{% for m in messages": "line 1",
    "{{ raise_exception('No.\nNot\x1b[31m today') }}": "refuses the conversation: No. Not",
    "{{ nothing.at.all }}": "UndefinedError",
    "{{ 'x' * 10 ** 9 }}": "a product is too large",
    "{{ 10 ** (10 ** 10) }}": "a power is too large",
    "{% for i in range(9999) %}{% for j in range(9999) %}{{ 'xxxxxxxxxx' }}{% endfor %}{% endfor %}": "more than",
    "{{ range(10 ** 9) | list }}": "OverflowError",
    "{% include '/etc/passwd' %}": "TypeError",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9) %}{% endfor %}{% endfor %}{% endfor %}":
        "it runs too long",
    "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(50) }}": "it runs too long",
}  # fmt: skip
if sys.platform == "linux":  # where memory can be limited
    HOSTILE["{{ 'x'.ljust(10 ** 10) }}"] = "MemoryError"
    HOSTILE["{% set n = namespace(x='x' * 999) %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"] = ""


@pytest.mark.parametrize("source", HOSTILE)
def test_a_template_that_misbehaves_is_one_sentence(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "MOST_SECONDS", 0.3 if HOSTILE[source] in ("it runs too long", "") else 10.0)
    template = ChatTemplate({"default": source}, tmp_path / "chat_template.jinja", {}, [])
    with pytest.raises(UserError) as error:
        template.render(TURNS)
    assert HOSTILE[source] in str(error.value)
    path = tmp_path / "chat_template.jinja"  # a refusal may be sent to a client, which should not see the path
    assert str(error.value).startswith(("The chat template refuses", f"The chat template in {path} cannot"))
    assert str(error.value).endswith((".", ").")) and "\n" not in str(error.value)
    assert template.end_of_turn is None


def test_a_checkpoint_with_a_broken_template_serves_other_styles(folders, tmp_path):
    shutil.copytree(folders["chatml"], tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text("{% if %}")
    tokenizer = Tokenizer(tmp_path / "m")
    assert tokenizer.encode("the cat")
    with pytest.raises(UserError, match="cannot be used \\(line 1"):
        get_prompt_style("chat", tokenizer).render("Hello")


# == files ==


def test_template_files_take_precedence_over_the_tokenizer_config(folders, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(folders["chatml"], folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())

    def source(chat_template) -> str | None:
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": chat_template}))
        template = Tokenizer(folder).template
        return template and template.source

    assert source("a") == "a" and source(None) is None
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "c"}]
    assert source(named) == "c" and source(named[:1]) is None
    (folder / "chat_template.jinja").write_text("\ufeff{{ bos_token }}d")
    assert source("a") == "{{ bos_token }}d"
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="chat_template is 5; expected text or a list"):
        source(5)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja is not text in UTF-8"):
        source("a")


def test_the_chat_style_without_a_template_gives_a_one_sentence_error(tokenizer_path):
    with pytest.raises(UserError, match="The prompt style 'chat' needs a chat template: ") as error:
        get_prompt_style("chat", tokenizer_path.parent)
    assert "\n" not in str(error.value)


def test_special_tokens_stay_text_in_another_process(folders):
    """Pickling loses this setting of the tokenizers library, so it must be restored."""
    tokenizer = pickle.loads(pickle.dumps(Tokenizer(folders["llama3"])))
    assert isinstance(tokenizer.engine, HuggingFace)
    assert not set(tokenizer.encode("a <|eot_id|>")) & set(tokenizer.stop_ids)
    assert tokenizer.template.render(TURNS[:1]) == Tokenizer(folders["llama3"]).template.render(TURNS[:1])


# == evaluation ==


def test_few_shot_examples_are_rendered_as_earlier_turns(folders):
    from evaluate import mmlu
    from evaluate.common import few_shot
    from evaluate.mmlu_data import Item

    style = get_prompt_style("chat", folders["chatml"])
    prompt = few_shot(style, [("1 + 1?", "2")], "2 + 2?")
    turns = [("user", "1 + 1?"), ("assistant", "2"), ("user", "2 + 2?")]
    assert prompt == style.render_messages([{"role": role, "content": text} for role, text in turns])
    assert isinstance(prompt, ChatText)
    item = Item("anatomy", "1 + 1?", ("1", "2", "3", "4"), "B")
    assert mmlu.render(item, [], style).endswith("<|im_start|>assistant\n")


def test_scoring_letters_after_a_chat_template_is_refused(refused, folders, tmp_path):
    (tmp_path / "m").mkdir()
    for path in (Path(__file__).parents[1] / "checkpoints/microworld").iterdir():
        (tmp_path / "m" / path.name).symlink_to(path)
    (tmp_path / "m" / "chat_template.jinja").write_text(TEMPLATES["mistral"])
    flags = ("--checkpoint_dir", tmp_path / "m", "--prompt_style", "chat", "--output_dir", tmp_path / "out")
    assert "use --scoring generate" in refused("evaluate/mmlu.py", *flags, "--data_file", tmp_path)
