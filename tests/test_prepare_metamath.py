"""MetaMathQA: real rows become questions in the Orca style and solutions that end with EOS."""

import json

import pytest

from lit_llama.data import SFT_FORMAT, SFTData, read_meta
from lit_llama.tokenizer import Tokenizer

SCRIPT = "scripts/prepare_metamath.py"


@pytest.fixture
def rows(shared):
    return shared / "data/benchmarks/gsm8k/metamathqa_4rows.json"


def test_prepared_rows_contain_the_original_texts(rows, shared, tmp_path, run_script):
    checkpoint_dir, folder = shared / "models/llama2-tokenizer", tmp_path / "metamath"
    code, out, err = run_script(
        SCRIPT, "--data_file", rows, "--output_dir", folder, "--checkpoint_dir", checkpoint_dir,
        "--test_fraction", 0.25, "--num_proc", 1,
    )  # fmt: skip
    assert (code, out) == (0, f"{folder}\n"), err
    tokenizer = Tokenizer(checkpoint_dir)
    meta = read_meta(folder, SFT_FORMAT)
    assert (meta["counts"]["train"], meta["counts"]["test"], meta["counts"]["cut"]) == (3, 1, 0)
    assert meta["prompt_style"] == "orca" and meta["mask_prompt"] and meta["max_seq_length"] == 512
    texts = set()
    for split in ("train", "test"):
        for prompt, response in SFTData(folder, split, tokenizer).prompts(4):
            assert response[-1] == tokenizer.eos_id
            texts.add((tokenizer.decode(prompt).strip(), tokenizer.decode(response).strip()))
    expected = [(f"[|User|] {row['query']} [|AI Assistant|]", row["response"]) for row in json.loads(rows.read_text())]
    assert texts == set(expected)


def test_a_row_without_a_solution_is_refused(tmp_path, base_dir, refused):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"query": "How many?", "response": "7"}, {"query": "Why?"}]))
    message = refused(SCRIPT, "--data_file", path, "--checkpoint_dir", base_dir, "--output_dir", tmp_path / "out")
    assert message == f"{path}: Row 2 has no field 'response'; it has 'query'."
    assert not (tmp_path / "out").exists()
