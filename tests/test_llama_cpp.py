"""A merged adapter in llama.cpp, converted with llama.cpp's script: token IDs and greedy answers equal ours.

This needs llama-cpp-python and the source of llama.cpp, which its source package contains (howto/merging.md):

    LLAMA_CPP=llama_cpp_python-0.3.36/vendor/llama.cpp python -m pytest tests/test_llama_cpp.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_llama.checkpoint import read_adapter
from lit_llama.compose import load_adapted
from lit_llama.generation import Sampling, instruct
from lit_llama.prompts import get_prompt_style
from lit_llama.tokenizer import Tokenizer
from microworld.world import UNSEEN, World

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
CONVERTER = Path(os.environ.get("LLAMA_CPP", ""), "convert_hf_to_gguf.py")
pytestmark = pytest.mark.skipif(not CONVERTER.is_file(), reason="LLAMA_CPP names no source folder of llama.cpp")

BASE, ADAPTER = Path("checkpoints/microworld"), Path("aligner_weights/microworld-pirate-n1")
QUESTIONS, MAX_NEW_TOKENS = 40, 40


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> "llama_cpp.Llama":
    folder = tmp_path_factory.mktemp("llama_cpp")
    merge = ["scripts/merge_aligner.py", "--checkpoint_dir", BASE, "--adapter", ADAPTER, "--output_dir", folder / "hf"]
    convert = [CONVERTER, folder / "hf", "--outfile", folder / "model.gguf", "--outtype", "f32"]
    for command in (merge, convert):
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=256, n_threads=1, verbose=False)


def test_token_ids_and_greedy_answers_are_equal(merged):
    tokenizer, style = Tokenizer(BASE), get_prompt_style("alpaca")
    questions = [question.text for question in World().questions(UNSEEN)[:QUESTIONS]]
    prompts = [style.render(question) for question in questions]
    ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    assert [merged.tokenize(prompt.encode()) for prompt in prompts] == ids

    model = load_adapted(BASE, [read_adapter(ADAPTER)], (1.0,))
    ours = instruct(model, tokenizer, questions, style, Sampling(MAX_NEW_TOKENS))
    theirs = [merged(row, max_tokens=MAX_NEW_TOKENS, temperature=0)["choices"][0]["text"].strip() for row in ids]
    assert theirs == ours
    assert sum(answer.startswith("Arr") for answer in theirs) > 0.9 * QUESTIONS
