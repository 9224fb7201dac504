"""MetaMathQA: real rows become questions in the Orca style and solutions that end with EOS."""

import json
from pathlib import Path

import pytest

from lit_llama.data import SFT_FORMAT, PromptData, SFTData, read_meta
from lit_llama.rewards import Reward, load_function
from lit_llama.tokenizer import Tokenizer
from scripts.prepare_metamath import states_number

SCRIPT = "scripts/prepare_metamath.py"


@pytest.mark.parametrize("stated", ["x+3", "2x", "5-x", r"\frac{x}{2}", r"(-\infty, 3)", r"x \le 3", "10!"])
def test_an_answer_that_is_an_expression_has_no_number(stated):
    reward = load_function("gsm8k")
    assert not states_number(f"It is 3.\nThe answer is: {stated}", reward)
    assert not states_number(f"It is 3.\n#### {stated}", reward)
    assert states_number("It is $x=3$.\nThe answer is: x = 3", reward) and states_number(
        "It is 2x, so 3 apples", reward
    )


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


def test_rows_come_from_a_configuration_and_a_split_of_a_dataset(tmp_path, base_dir, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    about = ""
    for name in ("main", "socratic"):
        about += f"- config_name: {name}\n  data_files:\n"
        for split in ("train", "test"):
            path = tmp_path / f"gsm8k/{name}/{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"question": f"{name} {split} {i}?", "answer": f"#### {i}"} for i in range(4)]
            path.write_text("\n".join(map(json.dumps, rows)))
            about += f"  - split: {split}\n    path: {name}/{split}.jsonl\n"
    (tmp_path / "gsm8k/README.md").write_text(f"---\nconfigs:\n{about}---\n")

    def run(*flags: str) -> tuple[int, str, str]:
        return run_script(SCRIPT, "--stage", "rl", "--repo_id", "gsm8k", "--checkpoint_dir", base_dir, "--output_dir",
                          "out", "--test_fraction", 0.25, "--num_proc", 1, *flags)  # fmt: skip

    assert run("--config_name", "socratic", "--split", "test")[0] == 0
    rows = [row for split in ("train", "test") for row in PromptData(tmp_path / "out", split).sources(range(1))]
    assert all(row["question"].startswith("socratic test ") for row in rows)
    assert json.loads(Path("out/meta.json").read_text())["source"] == "gsm8k, config socratic, split test"
    for flags, reason in (
        ((), "Config name is missing. Please pick one among the available configs: ['main', 'socratic']"),
        (("--config_name", "x"), "BuilderConfig 'x' not found. Available: ['main', 'socratic']"),
        (("--config_name", "main", "--split", "x"), "Unknown split \"x\". Should be one of ['train', 'test']"),
    ):
        code, _, err = run(*flags)
        assert (code, err.splitlines()[-1]) == (1, f"error: Cannot read gsm8k: {reason}.")


def test_a_row_without_a_solution_is_refused(tmp_path, base_dir, refused):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"query": "How many?", "response": "7"}, {"query": "Why?"}]))
    message = refused(SCRIPT, "--data_file", path, "--checkpoint_dir", base_dir, "--output_dir", tmp_path / "out")
    assert message == f"{path}: Row 2 has no field 'response'; it has 'query'."
    assert not (tmp_path / "out").exists()


def test_broken_text_is_reported_with_the_number_of_its_row(tmp_path, base_dir, run_script):
    path = tmp_path / "rows.json"
    word = {"query": "Who?", "response": "The answer is: Ann"}
    rows = [word, {"query": "How many?", "response": "The answer is: 4", "original_question": "\ud800"}]
    path.write_text(json.dumps(rows))
    folders = ("--checkpoint_dir", base_dir, "--output_dir", tmp_path / "out")
    code, _, err = run_script(SCRIPT, "--stage", "rl", "--data_file", path, *folders)
    assert code == 1 and err.splitlines()[-1].startswith(f"error: {path}: Row 2 ")


def test_prompts_for_the_reward_have_a_number_as_the_answer(tmp_path, base_dir, run_script):
    """A root and a word are omitted, although the solutions have numbers."""
    root = {"query": "How far is it?", "response": "The legs are 1 and 2.\nThe answer is: \\sqrt{5}"}
    word = {"query": "Who has most?", "response": "Evelyn has 3.\nThe answer is: \\text{Evelyn}"}
    usable = [
        {"query": "How much?", "response": "It costs $2 each.\nThe answer is: 1,200"},
        {"query": "How cold?", "response": "It fell by 5 degrees.\nThe answer is: -3.5"},
        {"query": "How many apples?", "response": "Two and two.\nThe answer is: 4"},
        {"query": "Which share?", "response": "Of 4, she has 3.\nThe answer is: \\frac{3}{4}"},
        {"question": "How many?", "answer": "She has <<2*9=18>>18.\n#### 18"},
    ]
    path, folder = tmp_path / "rows.json", tmp_path / "out"
    path.write_text(json.dumps([root, *usable[:3], word, *usable[3:]]))
    code, _, err = run_script(
        SCRIPT, "--stage", "rl", "--data_file", path, "--checkpoint_dir", base_dir, "--output_dir", folder,
        "--max_seq_length", 2000, "--num_proc", 1,
    )  # fmt: skip
    assert code == 0 and "Omitted 2 rows whose answer is not a number. Kept 5 rows." in err
    assert json.loads((folder / "meta.json").read_text())["left_out"] == {"whose answer is not a number": 2}
    sources = []
    for split in ("train", "test"):
        data = PromptData(folder, split)
        sources += data.sources(range(len(data)))
    assert sorted(sources, key=str) == sorted(usable, key=str)
    assert Reward("gsm8k")([""] * 5, ["0.75"] * 5, sources, list(range(5))).count(1) == 1
