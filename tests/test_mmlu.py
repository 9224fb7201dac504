"""MMLU: files, prompts, log-probabilities of the answer letters, and the evaluation from questions to summary."""

import csv
import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from chat_models import write_model
from hypothesis import given
from hypothesis import strategies as st

from evaluate import mmlu
from evaluate.common import load
from evaluate.letters import LETTERS, Letters, length_batches, letter_logps
from evaluate.mmlu import Settings, read_letter
from evaluate.mmlu_data import CATEGORIES, CATEGORY, Item, read_items
from evaluate.settings import ModelSettings
from lit_llama.checkpoint import load_model, save_base
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.prompts import get_prompt_style
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError

ROOT = Path(__file__).parents[1]
MICROWORLD = ROOT / "checkpoints/microworld"
SCRIPT = "evaluate/mmlu.py"


def toy_items(subject: str, split: str, count: int) -> list[Item]:
    """Return short questions; some choices could be misread when parsed from a table."""
    choices = ("None", 'the "cat"', "a, b\nand c", "")
    return [Item(subject, f"{split} {i} of {subject}?", choices, LETTERS[i % 4]) for i in range(count)]


TOYS = {
    split: {subject: toy_items(subject, split, count) for subject in ("anatomy", "sociology", "virology")}
    for split, count in (("dev", 2), ("test", 4))
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Write the toy questions in the layout of the MMLU authors' archive."""
    for split, subjects in TOYS.items():
        (tmp_path / "data" / split).mkdir(parents=True)
        for subject, items in subjects.items():
            with (tmp_path / "data" / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([i.question, *i.choices, i.answer] for i in items)
    (tmp_path / "data/README.txt").write_text("questions")
    return tmp_path / "data"


def hub_rows(split: str) -> str:
    """Return the toy questions in the schema of cais/mmlu, as JSON Lines."""
    items = [item for items in TOYS[split].values() for item in items]
    rows = [
        {"question": i.question, "subject": i.subject, "choices": i.choices, "answer": LETTERS.index(i.answer)}
        for i in items
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def repository(tmp_path) -> Path:
    """Write a dataset with the layout of cais/mmlu; `datasets` reads a local folder like one on the Hub."""
    path = tmp_path / "mmlu"
    (path / "all").mkdir(parents=True)
    for split in TOYS:
        (path / f"all/{split}.jsonl").write_text(hub_rows(split))
    parts = "".join(f"  - split: {split}\n    path: all/{split}.jsonl\n" for split in TOYS)
    (path / "README.md").write_text(f"---\nconfigs:\n- config_name: all\n  data_files:\n{parts}---\n")
    return path


def test_every_source_gives_the_same_questions(folder, repository, tmp_path):
    archive = tmp_path / "mmlu.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.rglob("*.*"):
            file.write(path, f"data/{path.relative_to(folder)}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(hub_rows("test"))
    parquet = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([json.loads(r) for r in hub_rows("test").splitlines()]), parquet
    )
    assert read_items(folder, "") == TOYS
    assert read_items(archive, "") == TOYS
    assert read_items(None, str(repository)) == TOYS
    assert read_items(rows, "") == {"dev": {}, "test": TOYS["test"]}
    assert read_items(parquet, "") == read_items(rows, "")
    one = read_items(folder / "test/anatomy_test.csv", "")
    assert one == {split: {"anatomy": TOYS[split]["anatomy"]} for split in TOYS}


def test_the_real_archive_is_complete(shared):
    items = read_items(shared / "data/benchmarks/mmlu/mmlu.zip", "")
    assert {split: sum(map(len, subjects.values())) for split, subjects in items.items()} == {"dev": 285, "test": 14042}
    assert set(items["test"]) == set(items["dev"]) == set(CATEGORY)
    assert {name: len(subjects) for name, subjects in CATEGORIES.items()} == {
        "STEM": 18, "humanities": 13, "social sciences": 12, "other": 14,
    }  # fmt: skip
    mathematics = items["test"]["college_mathematics"]
    assert mathematics[21].choices == ("None", "One", "Four", "Five")  # not a missing value


def test_prompts():
    item, example = toy_items("us_foreign_policy", "test", 1)[0], toy_items("us_foreign_policy", "dev", 2)[1]
    choices = 'A. None\nB. the "cat"\nC. a, b\nand c\nD. '
    assert mmlu.render(item, [example], get_prompt_style("plain")) == (
        "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
        f"dev 1 of us_foreign_policy?\n{choices}\nAnswer: B\n\n"
        f"test 0 of us_foreign_policy?\n{choices}\nAnswer:"
    )
    prompt = mmlu.render(item, [example], get_prompt_style("alpaca"))
    assert prompt.count("### Response:") == 2 and "### Response: B\n\nBelow is" in prompt
    assert prompt.endswith("### Response:")
    prompt = mmlu.render(item, [], get_prompt_style("orca"))
    assert prompt.endswith("[|AI Assistant|] ")  # as in training; generated answers follow the space
    tokenizer = Tokenizer(MICROWORLD)
    letters = Letters.of(tokenizer, response=True)
    assert letters.prompt(tokenizer, prompt) == tokenizer.encode(prompt, bos=True)


def test_letters_without_tokens_of_their_own_are_refused():
    class Merging(Tokenizer):
        def encode(self, text: str, **options) -> list[int]:
            return super().encode(text[:-1], **options)

    with pytest.raises(UserError, match="gives the letters A to D the same tokens; use --scoring generate"):
        Letters.of(Merging(MICROWORLD))


def naive_logps(network, tokenizer: Tokenizer, prompt: str, response: bool) -> list[float]:
    """Return the log-probability of each letter's tokens, with one unpadded forward pass per letter."""
    start = tokenizer.encode(prompt, bos=True)
    logps = []
    for letter in LETTERS:
        if response:
            ids = start + tokenizer.encode_response(prompt, letter)[:-1]  # without EOS
        else:
            ids = tokenizer.encode(f"{prompt} {letter}", bos=True)
        assert ids[: len(start)] == start
        with torch.no_grad():
            table = network(torch.tensor([ids]))[0, :, : network.config.vocab_size].log_softmax(-1)
        logps.append(sum(table[i - 1, ids[i]].item() for i in range(len(start), len(ids))))
    return logps


@pytest.mark.parametrize(
    "name, style",
    [("microworld", "plain"), ("stories260K", "plain"), ("microworld", "orca"), ("stories260K", "alpaca"),
     ("bytes", "alpaca")],
)  # fmt: skip
def test_log_probabilities_equal_those_of_one_letter_at_a_time(name, style, request, tmp_path, run_script):
    """The bundled tokenizer has the piece "▁A"; stories260K has "▁B", but "A", "C" and "D" only without the space."""
    checkpoint_dir = MICROWORLD
    if name == "stories260K":
        hf_dir = request.getfixturevalue("shared") / "models/stories260K-hf"
        checkpoint_dir = tmp_path / "lit"
        run_script("scripts/convert_hf_checkpoint.py", "--checkpoint_dir", hf_dir, "--output_dir", checkpoint_dir)
    if name == "bytes":  # "A" and " A" have different tokens
        checkpoint_dir = write_model(tmp_path, "chatml")
        tokenizer = Tokenizer(checkpoint_dir)
        config = LLaMAConfig(block_size=1024, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=16,
                             intermediate_size=24)  # fmt: skip
        save_base(checkpoint_dir, config, LLaMA(config).state_dict())
    network, tokenizer = load_model(checkpoint_dir), Tokenizer(checkpoint_dir)
    response = style != "plain"
    letters = Letters.of(tokenizer, response)
    assert len(letters.space) == (name == "stories260K")
    prompts = [mmlu.render(item, [], get_prompt_style(style)) for item in toy_items("anatomy", "test", 3)]
    prompts.append(get_prompt_style(style).render("Which letter?\nAnswer:"))
    actual = letter_logps(network, [letters.prompt(tokenizer, prompt) for prompt in prompts], letters)
    expected = torch.tensor([naive_logps(network, tokenizer, prompt, response) for prompt in prompts])
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 200))
def test_batches_contain_every_question_once_and_fit_the_token_limit(lengths, batch_tokens):
    lengths = {f"q{i}": length for i, length in enumerate(lengths)}
    batches = length_batches(lengths, batch_tokens)
    assert sorted(id for batch in batches for id in batch) == sorted(lengths)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[id] for id in batch) <= batch_tokens


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("(C) because", "C"),
        ("D. A cat", "D"),
        ("**A**", "A"),
        ("The answer is B.", "B"),
        ("I think the answer is: (C)", "C"),
        ("A cat is an animal", None),
        ("The answer is A cat", None),
        ("The answer is a cat", None),
        ("A is the correct answer.", "A"),
        ("B is the correct answer.", "B"),
        ("C because it is green", "C"),
        ("The correct answer is A because", "A"),
        ("The correct answer is B because", "B"),
        ("Blue-green", "B"),
        ("blue", "B"),
        ("Green, of course", "C"),
        ("none", None),
        ("", None),
        ("The correct answer is option B.", "B"),
        ("The answer is: Option (B)", "B"),
        ("Option B", "B"),
        ("Option C: grey", "C"),
        ("The correct option is B", "B"),
        ("The correct choice is B.", "B"),
        (r"The answer is \boxed{B}", "B"),
        (r"The answer is $\boxed{\text{B}}$.", "B"),
        (r"$\boxed{B}$", "B"),
        ("ANSWER: B", "B"),
        ("The correct option is A cat", None),
        ("Option A is wrong, so the answer is B", "B"),
        ("One option is B, but the answer is C.", "C"),
        ("The options are B and C", None),
        ("The adoption of B cells", None),
        ("A\nphotosynthesis", "A"),
        ("B\nrespiration", "B"),
        ("Answer: A\nexplanation: it is red", "A"),
    ],
)
def test_reading_the_letter_from_an_answer(answer, letter):
    choices = ["red", "blue", "green", "grey"]
    assert read_letter({"answer": answer, "choices": choices}) == {"predicted": letter}


@pytest.mark.parametrize(
    "answer, letter",
    [("10", "D"), ("1.", "A"), ("2 apples", "B"), ("1.5 apples", "C"), ("12 apples", None), ("2.5", None)],
)
def test_an_answer_begins_with_the_longest_choice_that_matches(answer, letter):
    assert read_letter({"answer": answer, "choices": ["1", "2", "1.5", "10"]}) == {"predicted": letter}
    assert read_letter({"answer": answer, "choices": ["", answer, answer, "none"]}) == {"predicted": None}


@pytest.mark.parametrize(
    "answer, letter",
    [("C major", "A"), ("D minor.", "B"), ("C", "C"), ("C.", "C"), ("D", "D"), ("B cells", "B"), ("A", "A")],
)
def test_a_choice_may_begin_with_a_letter(answer, letter):
    assert read_letter({"answer": answer, "choices": ["C major", "D minor", "B", "C"]}) == {"predicted": letter}


def settings(data_file: Path, tmp_path: Path, **others) -> Settings:
    return Settings(data_file=data_file, output_dir=tmp_path / "out", accelerator="cpu", **others)


def test_the_evaluation_predicts_the_most_probable_letter(folder, tmp_path, capsys):
    first = mmlu.main(settings(folder, tmp_path, limit=2, shots=0))
    assert (first["n"], first["skipped"]) == (6, 0)
    summary = mmlu.main(settings(folder, tmp_path, shots=0))  # resumes
    assert json.loads((tmp_path / "out/summary.json").read_text()) == json.loads(json.dumps(summary))
    records = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert len({r["id"] for r in records}) == len(records) == 12
    for record in records:
        assert record["predicted"] == max(record["logps"], key=record["logps"].get)
    correct = {r["id"]: r["predicted"] == r["gold"] for r in records}
    assert summary["accuracy"] == np.mean(list(correct.values()))
    assert summary["subjects"]["virology"]["accuracy"] == np.mean([correct[f"virology/{i}"] for i in (1, 2, 3, 4)])
    other = [ok for id, ok in correct.items() if not id.startswith("sociology")]  # two of the three are in "other"
    assert summary["categories"]["other"]["accuracy"] == np.mean(other)
    assert set(summary["categories"]) == {"social sciences", "other"}
    assert sum(summary["predicted"].values()) == 12
    assert "| sociology | 4 | 0 |" in capsys.readouterr().out


def test_padding_and_batches_do_not_change_the_scores(folder, tmp_path):
    """Lengths differ between zero-shot questions of different subjects."""
    scores = []
    for batch_tokens in (1, 100, 16384):
        mmlu.main(Settings(data_file=folder, output_dir=tmp_path / str(batch_tokens), shots=0, accelerator="cpu",
                           batch_tokens=batch_tokens))  # fmt: skip
        lines = (tmp_path / str(batch_tokens) / "answers.jsonl").read_text().splitlines()
        scores.append({r["id"]: list(r["logps"].values()) for r in map(json.loads, lines)})
    for others in scores[1:]:
        assert all(others[id] == pytest.approx(scores[0][id], abs=1e-4) for id in scores[0])


def test_generated_answers_are_parsed(folder, tmp_path):
    out = settings(folder, tmp_path, scoring="generate", shots=1, subjects=("anatomy",), max_new_tokens=4, limit=2)
    summary = mmlu.main(out)
    path = tmp_path / "out/answers.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert summary["n"] == len(records) == 2 and 0 <= summary["ended_share"] <= 1
    assert all(r["tokens"] <= 4 and r["predicted"] == read_letter(r)["predicted"] for r in records)
    path.write_text("".join(json.dumps({**r, "answer": "B"}) + "\n" for r in records))
    summary = mmlu.main(out)  # reads the answers again
    assert summary["predicted"] == {"A": 0, "B": 2, "C": 0, "D": 0, "none": 0}
    assert summary["accuracy"] == 0.5  # the first question's letter is A, the second's B


def test_long_questions_are_skipped_and_counted_or_refused(folder, tmp_path, refused):
    path = folder / "test/anatomy_test.csv"
    with path.open("a", newline="") as file:
        csv.writer(file).writerow(["the cat " * 300, "a", "b", "c", "d", "A"])
    arguments = ["--data_file", folder, "--output_dir", tmp_path / "out", "--skip_long", "false"]
    assert "1 of 13 prompts are longer than 255 tokens" in refused(SCRIPT, *arguments)
    summary = mmlu.main(settings(folder, tmp_path, shots=0))
    assert (summary["n"], summary["skipped"], summary["subjects"]["anatomy"]["skipped"]) == (12, 1, 1)


def test_an_adapter_at_strength_zero_is_the_base(folder, tmp_path):
    adapter = ROOT / "aligner_weights/microworld-json-n1"
    base = load(ModelSettings(checkpoint_dir=MICROWORLD, accelerator="cpu"))
    off = load(ModelSettings(checkpoint_dir=MICROWORLD, accelerator="cpu", adapter=adapter, strength=0.0))
    on = load(ModelSettings(checkpoint_dir=MICROWORLD, accelerator="cpu", adapter=adapter))
    letters = Letters.of(base.tokenizer)
    prompts = [letters.prompt(base.tokenizer, "Which?\nAnswer:")]
    logps = [letter_logps(evaluated.model, prompts, letters) for evaluated in (base, off, on)]
    assert torch.equal(logps[0], logps[1]) and not torch.equal(logps[0], logps[2])


def test_the_benchmark_measures_scoring_and_a_plain_forward_pass(folder, run_script, fixed_rates):
    arguments = ["--data_file", folder, "--rounds", 1, "--clock", "cpu", "--accelerator", "cpu"]
    code, out, err = run_script("benchmarks/mmlu.py", *arguments)
    assert code == 0, err
    assert "\n12 questions, " in out
    assert "| letters' log-probabilities | " in out and "| plain forward pass | " in out


def test_user_errors(folder, tmp_path, refused):
    def message(*arguments) -> str:
        return refused(SCRIPT, "--data_file", folder, "--output_dir", tmp_path / "out", *arguments)

    assert "no subject 'anatomi'; the nearest name is 'anatomy'" in message("--subjects", "anatomi")
    assert "no questions of the subject 'astronomy'" in message("--subjects", "astronomy")
    assert "has 2 dev questions of anatomy, fewer than --shots 5; use --shots 2" in message("--shots", "5")
    assert "limit is 0" in message("--limit", "0")
    assert "There is no zip file" in refused(SCRIPT, "--data_file", tmp_path / "none.zip")
    assert "There is no file at" in refused(SCRIPT, "--data_file", tmp_path / "anatomy.csv")
    for name in ("mine.csv", "data.tar"):
        (tmp_path / name).touch()
        sentence = refused(SCRIPT, "--data_file", tmp_path / name)
        assert sentence.startswith(f"{tmp_path / name} cannot be used: --data_file takes mmlu.zip, the folder")
    with zipfile.ZipFile(tmp_path / "locked.ZIP", "w") as file:
        file.writestr("anatomy_test.csv", "")
    content = bytearray((tmp_path / "locked.ZIP").read_bytes())
    for header, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(header) + offset] |= 1  # mark as encrypted
    (tmp_path / "locked.ZIP").write_bytes(content)
    assert "cannot be read" in refused(SCRIPT, "--data_file", tmp_path / "locked.ZIP")
    (tmp_path / "broken.zip").write_text("no archive")
    assert "cannot be read" in refused(SCRIPT, "--data_file", tmp_path / "broken.zip")
    (tmp_path / "empty").mkdir()
    assert "has no test questions" in refused(SCRIPT, "--data_file", tmp_path / "empty")
    assert not (tmp_path / "out").exists()


def test_blank_lines_are_skipped(folder):
    with (folder / "test/anatomy_test.csv").open("a", newline="") as file:
        file.write("\n\r\n")
    assert read_items(folder, "") == TOYS


@pytest.mark.parametrize(
    "line, message",
    [
        ("How?,a,b,c,A\n", "Row 5 of .*anatomy_test.csv has 5 columns instead of 6"),
        ("How?,a,b,c,d,E\n", "Row 5 of .*: the answer is 'E'"),
        ('"How?,a,b,c,d,A\n', "Row 5 of .* is not CSV"),
    ],
)
def test_bad_csv_rows_are_reported(folder, refused, line, message):
    with (folder / "test/anatomy_test.csv").open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=message):
        read_items(folder, "")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "How?", "subject": "anatomy", "answer": 0}, "Row 1 of .*'choices' is not a list of four"),
        ({"question": "How?", "subject": "anatomy", "choices": ["a"] * 3, "answer": 0}, "list of four"),
        (
            {"question": "How?", "subject": "anatomy", "choices": ["\ud800"] * 4, "answer": 0},
            "'choices' holds one half",
        ),
        ({"question": "How?", "subject": "cooking", "choices": ["a"] * 4, "answer": 0}, "'cooking' is not one of"),
        ({"question": "How?", "subject": "anatomy", "choices": ["a"] * 4, "answer": 4}, "the answer is '4'"),
        ({"question": "How?", "subject": "anatomy", "choices": ["a"] * 4, "answer": True}, "the answer is 'True'"),
        ({"subject": "anatomy", "choices": ["a"] * 4, "answer": 0}, "Row 1 has no field 'question'"),
        (["How?"], "Row 1 is not an object"),
    ],
)
def test_bad_rows_are_reported(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        read_items(path, "")
