"""Prompt styles and the tokenizer."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from lit_llama.prompts import PROMPT_STYLES, get_prompt_style, instruction_of
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError


def test_the_alpaca_style_is_the_published_prompt():
    """The published prompts are PROMPT_DICT in train.py of tatsu-lab/stanford_alpaca."""
    style = get_prompt_style("alpaca")
    assert style.render("Say hi.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n### Instruction:\nSay hi.\n\n### Response:"
    )
    assert style.render("Add.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:"
    )


@pytest.mark.parametrize(
    "name, text",
    [
        ("orca", "[|User|] Say hi. [|AI Assistant|] "),
        ("beaver", "[User] Say hi. [Assistant] "),
        ("hh", "Human: Say hi. Assistant: "),
        ("plain", "Say hi."),
    ],
)
def test_the_other_styles(name, text):
    style = get_prompt_style(name)
    assert style.name == name
    assert style.render("Say hi.") == text
    assert style.render("Say hi.", "To me.") == text.replace("Say hi.", "Say hi.\nTo me.")
    blank, question = {"role": "system", "content": " "}, {"role": "user", "content": "Say hi."}
    assert style.render_messages([blank, question]) == style.render("Say hi.", system=" ") == text


# instructions that contain the placeholders and special characters of templates
tricky = st.lists(
    st.sampled_from(["{instruction}", "{input}", "{", "}", "{}", "{0}", "%s", "\\1", "### Response:", "a", " "]),
    min_size=1,
).map("".join)


@given(instruction=tricky, input=tricky)
def test_user_texts_are_inserted_unchanged(instruction, input):
    """Braces, backslashes and template fields in a user's text have no special meaning."""
    instruction += "!"
    for style in PROMPT_STYLES.values():
        before, after = style.template.split("{instruction}")
        assert style.render(instruction) == before + instruction + after
        with_input = style.template_with_input
        if with_input is None:
            assert style.render(instruction, input) == f"{before}{instruction}\n{input}{after}"
        else:
            before, rest = with_input.split("{instruction}")
            between, after = rest.split("{input}")
            assert style.render(instruction, input) == before + instruction + between + input + after


def test_empty_prompts_and_unknown_styles_are_refused():
    for empty in ("", " \n"):
        with pytest.raises(UserError, match="The prompt is empty"):
            get_prompt_style("alpaca").render(empty, "an input")
    with pytest.raises(UserError, match="There is no prompt style 'alpacca'; choose from alpaca, orca"):
        get_prompt_style("alpacca")


TEXTS = [
    "", " ", "Hello, world!", "  two  spaces ", "line\nline\n\n", "tab\t", "naïve café", "日本語 😀", "</s>",
    "<s>a</s> <unk> <0x0A>", "[INST] x [/INST]", "\u2028", "### Response:",
]  # fmt: skip


def test_the_tokenizer_matches_sentencepiece(shared):
    path = shared / "models/llama2-tokenizer/tokenizer.model"
    tokenizer, reference = Tokenizer(path.parent), SentencePieceProcessor(str(path))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    assert tokenizer.stop_ids == (2, 1)
    assert tokenizer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for text in TEXTS:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.encode(text, bos=True) == [1, *ids]
        assert tokenizer.encode(text, bos=True, eos=True) == [1, *ids, 2]
        assert tokenizer.decode(ids) == reference.decode(ids) == text
    # known ids of LLaMA's tokenizer
    assert tokenizer.encode("Hello, world!", bos=True) == [1, 15043, 29892, 3186, 29991]


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁")))  # SentencePiece's symbol for a space
def test_special_tokens_in_a_text_are_plain_text(tokenizer, text):
    for special in ("<s>", "</s>", "<unk>"):
        ids = tokenizer.encode(special + text + special)
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
        assert tokenizer.decode(ids) == special + text + special


def test_ids_beyond_the_vocabulary_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, 10**6]) == "the cat"


def test_missing_and_invalid_tokenizers_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"There is no tokenizer at .*tokenizer\.model"):
        Tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"There is no checkpoint folder at .*Llama-2-7b; howto"):
        Tokenizer(tmp_path / "Llama-2-7b")
    for content in (b"", b"text", b'{"model": {}}'):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match="is not a SentencePiece model"):
            Tokenizer(tmp_path)


def test_a_tokenizer_with_a_corrupted_byte_is_refused(tmp_path):
    """The library quotes the corrupted piece in its error, which is then not valid UTF-8."""
    content = bytearray((Path(__file__).parent.parent / "checkpoints/microworld/tokenizer.model").read_bytes())
    content[120] = 155
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("name", [name for name in PROMPT_STYLES if name != "plain"])
def test_the_instruction_is_extracted_from_a_prompt(name):
    prompt = PROMPT_STYLES[name].render("Where is the cat?")
    assert instruction_of(prompt) == instruction_of(prompt.strip()) == "Where is the cat?"
    assert instruction_of("Where is the cat?") == "Where is the cat?"
