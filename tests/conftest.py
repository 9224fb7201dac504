"""Fixtures shared by the tests. Real material comes from the folder `shared` beside the project, where there is one."""

import io
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer

from lit_llama.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the folder of real models and data is absent")
    return folder


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA-like tokenizer: 300 pieces, BPE, bytes for unknown characters, unk 0, bos 1, eos 2."""
    text = ["the cat sat on the mat and the dog ate the hat", "Below is an instruction. Write a response."]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20), model_writer=model, vocab_size=300, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(tokenizer_path)
