"""Hugging Face tokenizers: special tokens follow the checkpoint's files, and ids match those of the library."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from lit_llama.huggingface.tokenizer_files import as_tokenizer_json, write_hf_tokenizer
from lit_llama.tokenizer import HuggingFace, Tokenizer
from lit_llama.utils import UserError

TEXTS = [
    "", " ", "the cat", " the cat", "  two  spaces ", "line\nline\n\n", "tab\t", "naïve café", "日本語 😀",
    "don't 12345", "\u2028", "### Response:", "▁", "a\r\nb", "a\n\n1.",
]  # fmt: skip
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GPT4_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def byte_level(special: list[str], before: list[pre_tokenizers.PreTokenizer], use_regex: bool) -> tokenizers.Tokenizer:
    """Train a small byte-level BPE with the special tokens after the vocabulary, as in published files."""
    engine = tokenizers.Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    engine.pre_tokenizer = pre_tokenizers.Sequence([*before, level])
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    engine.train_from_iterator(["the cat sat on the mat and the dog ate the hat\n\n"] * 5, trainer)
    engine.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    return engine


def write(folder: Path, engine: tokenizers.Tokenizer, generation: dict[str, Any] | None, **about: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    engine.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **about}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture(scope="module")
def llama3(tmp_path_factory) -> Path:
    """Like Llama 3.1 Instruct: a template adds bos, and the generation config lists a second eos token."""
    split = pre_tokenizers.Split(Regex(GPT4_SPLIT), behavior="isolated")
    engine = byte_level(SPECIAL[:3], [split], use_regex=False)
    bos = engine.token_to_id("<|begin_of_text|>")
    engine.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
            ),
        ]
    )  # fmt: skip
    generation = {"bos_token_id": bos, "eos_token_id": [bos + 1, bos + 2]}
    folder = tmp_path_factory.mktemp("llama3")
    return write(folder, engine, generation, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """Like SmolLM2 Instruct: digits are split, no template adds bos, and the special tokens are those of ChatML.

    The class that it names does not split digits in transformers 5.
    """
    engine = byte_level(SPECIAL[3:], [pre_tokenizers.Digits(individual_digits=True)], use_regex=True)
    folder = tmp_path_factory.mktemp("smollm2")
    return write(folder, engine, {"eos_token_id": engine.token_to_id("<|im_end|>")}, tokenizer_class="GPT2Tokenizer",
                 bos_token="<|im_start|>", eos_token={"content": "<|im_end|>", "__type": "AddedToken"},
                 unk_token="<|endoftext|>", add_prefix_space=False)  # fmt: skip


def test_llama3_style(llama3):
    tokenizer = Tokenizer(llama3)
    size = tokenizer.vocab_size
    assert (tokenizer.bos_id, tokenizer.eos_id) == (size - 3, size - 1)
    assert tokenizer.stop_ids == (size - 1, size - 3 + 1, size - 3)  # <|eot_id|>, <|end_of_text|>, bos
    ids = tokenizer.encode("the cat")
    assert tokenizer.encode("the cat", bos=True, eos=True) == [size - 3, *ids, size - 1]
    assert tokenizer.path.name == "tokenizer.json" and len(tokenizer.sha256) == 64


def test_smollm2_style(smollm2):
    tokenizer = Tokenizer(smollm2 / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (-1, tokenizer.vocab_size - 1)
    ids = tokenizer.encode("the cat 12")
    assert tokenizer.encode("the cat 12", bos=True, eos=True) == [*ids, tokenizer.eos_id]  # without bos
    assert tokenizer.stop_ids == (tokenizer.eos_id, tokenizer.vocab_size - 2)
    assert tokenizer.encode("12") == [*tokenizer.encode("1"), *tokenizer.encode("2")]


@pytest.mark.parametrize("add", [True, False])
def test_the_config_controls_whether_texts_begin_with_bos(add, smollm2, tmp_path):
    engine = tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    folder = write(tmp_path, engine, None, bos_token="<|endoftext|>", eos_token="<|im_end|>", add_bos_token=add)
    assert (Tokenizer(folder).encode("a", bos=True)[0] == engine.token_to_id("<|endoftext|>")) == add


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("style", ["llama3", "smollm2"])
def test_ids_match_those_of_transformers(style, add_bos, request, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = shutil.copytree(request.getfixturevalue(style), tmp_path / "source")
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": add_bos}))
    ours, written = Tokenizer(source), tmp_path / "written"
    written.mkdir()
    write_hf_tokenizer(written, ours, block_size=64)
    assert Tokenizer(written).bos_id == ours.bos_id and (add_bos is None or add_bos == (ours.bos_id >= 0))
    assert ((written / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()) == (
        add_bos in (None, style == "llama3")
    )
    theirs = transformers.AutoTokenizer.from_pretrained(written)
    assert theirs.eos_token_id == ours.eos_id
    for text in TEXTS:
        assert ours.encode(text, bos=True) == theirs(text)["input_ids"], text
        assert ours.decode(ours.encode(text)) == text
    for text in SPECIAL:
        text = f"a {text} b{text}"
        assert ours.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_a_post_processor_that_only_appends_eos_is_kept(smollm2, tmp_path):
    source = shutil.copytree(smollm2, tmp_path / "source")
    engine = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    end = "<|im_end|>"
    engine.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, engine.token_to_id(end))]
    )
    engine.save(str(source / "tokenizer.json"))
    (tmp_path / "written").mkdir()
    write_hf_tokenizer(tmp_path / "written", Tokenizer(source), block_size=64)
    assert (tmp_path / "written/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("style", ["llama3", "smollm2"])
@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("<|>")), max_size=12))
def test_special_tokens_in_a_text_are_plain_text(style, request, text):
    tokenizer = Tokenizer(request.getfixturevalue(style))
    for special in SPECIAL:
        ids = tokenizer.encode(special + text + special)
        assert not {i for i in ids if i in tokenizer.stop_ids}
        assert tokenizer.decode(ids) == special + text + special
    assert tokenizer.decode([tokenizer.eos_id, *tokenizer.encode(text), *tokenizer.stop_ids, 10**6]) == text


def test_a_sentencepiece_model_takes_precedence(llama3, tokenizer_path, tmp_path):
    shutil.copytree(llama3, tmp_path / "both")
    shutil.copy(tokenizer_path, tmp_path / "both")
    tokenizer = Tokenizer(tmp_path / "both")
    assert tokenizer.path.name == "tokenizer.model" and (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    eos_ids = json.loads((llama3 / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.stop_ids == (2, *eos_ids, 1)


def test_missing_and_damaged_files(llama3, tmp_path):
    with pytest.raises(UserError, match=r"needs its tokenizer\.model or tokenizer\.json"):
        Tokenizer(tmp_path)
    shutil.copy(llama3 / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match=r"no end-of-text token; name it in the tokenizer_config\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert Tokenizer(tmp_path).eos_id == 5
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json is not JSON"):
        Tokenizer(tmp_path)
    for content in ("", "{}", '{"version": "1.0"}', "not JSON"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match="is not a tokenizer of Hugging Face"):
            Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match=r"tokenizer\.json is a Git LFS pointer, so fetch .* with `git lfs pull`"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # Llama 3's file is not a SentencePiece model
    with pytest.raises(UserError, match=r"is not a SentencePiece model\. A checkpoint's tokenizer\.json is read"):
        Tokenizer(tmp_path)


FILES_BESIDE = {
    "tokenizer_config.json: eos_token is 3; expected text or an object": (
        "tokenizer_config.json",
        {"eos_token": 3},
    ),
    "tokenizer_config.json: bos_token has no content": ("tokenizer_config.json", {"bos_token": {"id": 1}}),
    'generation_config.json: eos_token_id is "5"; expected': ("generation_config.json", {"eos_token_id": "5"}),
    "generation_config.json: eos_token_id is 18446744073709551616": ("generation_config.json", {"eos_token_id": 2**64}),
    "generation_config.json holds a list; expected an object": ("generation_config.json", [5]),
    "tokens and the model 64: they do not belong together": ("lit_config.json", {"vocab_size": 64}),
}


@pytest.mark.parametrize("sentence", FILES_BESIDE)
def test_other_files_of_the_tokenizer_are_checked(sentence, llama3, tmp_path):
    name, content = FILES_BESIDE[sentence]
    shutil.copy(llama3 / "tokenizer.json", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        Tokenizer(tmp_path)
    assert sentence in str(error.value)


# == SentencePiece models as tokenizer.json ==


@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n<>thecatx0A")), max_size=20))
def test_ids_match_those_of_sentencepiece(text, tokenizer_path):
    processor, engine = SentencePieceProcessor(str(tokenizer_path)), as_tokenizer_json(tokenizer_path)
    engine.encode_special_tokens = True
    ids = processor.encode(text)
    assert engine.encode(text, add_special_tokens=False).ids == ids
    assert engine.decode(ids) == processor.decode(ids)
    assert engine.encode(text).ids == [1, *ids]
    tokenizer = HuggingFace(engine.to_str().encode(), {})
    for n in range(len(ids)):  # also from and to the middle of a character
        assert tokenizer.decode(ids[:n]) == processor.decode(ids[:n])
        assert tokenizer.decode(ids[n:]) == processor.decode(ids[n:])


def test_the_converted_llama2_tokenizer_equals_the_original(shared, tmp_path):
    path = shared / "models/llama2-tokenizer/tokenizer.model"
    engine = as_tokenizer_json(path)
    folder = write(tmp_path, engine, None, bos_token="<s>", eos_token="</s>")
    tokenizer, reference = Tokenizer(folder), Tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.stop_ids) == (32000, (2, 1))
    for text in [*TEXTS, "</s>", "<s>a</s> <unk> <0x0A>", "Once upon a time, in 1984, there was a dragon."]:
        ids = reference.encode(text, bos=True, eos=True)
        assert tokenizer.encode(text, bos=True, eos=True) == ids
        for n in range(len(ids) + 1):
            assert tokenizer.decode(ids[:n]) == reference.decode(ids[:n])


def test_a_sentencepiece_checkpoint_can_omit_bos(tokenizer_path, tmp_path):
    shutil.copy(tokenizer_path, tmp_path)
    ids = Tokenizer(tmp_path).encode("the cat")
    for add, first in ((True, [1]), (False, [])):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": add, "legacy": True}))
        tokenizer = Tokenizer(tmp_path)
        assert tokenizer.encode("the cat", bos=True, eos=True) == [*first, *ids, 2]
        assert tokenizer.stop_ids == (2, 1)
        folder = tmp_path / str(add)
        folder.mkdir()
        write_hf_tokenizer(folder, tokenizer, block_size=64)
        assert Tokenizer(folder / "tokenizer.json").encode("the cat", bos=True) == [*first, *ids]
        assert Tokenizer(folder).identity == tokenizer.identity
        transformers = pytest.importorskip("transformers")
        assert transformers.AutoTokenizer.from_pretrained(folder)("the cat")["input_ids"] == [*first, *ids]
