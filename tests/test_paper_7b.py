"""The command for the paper's benchmarks, from raw rows to the report, on the bundled model and a few rows."""

import csv
import importlib
import json
import shlex
import sys
from pathlib import Path

import pytest

import studies.paper_7b as study

BASE = Path(__file__).parents[1] / "checkpoints" / "microworld"
SMALL = ("--table", "fig5_right", "--methods", "aligner1", "--checkpoint_dir", BASE, "--limit", 2, "--max_steps", 1,
         "--max_seq_length", 128, "--max_new_tokens", 6, "--accelerator", "cpu")  # fmt: skip


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path) -> tuple:
    """Write a few rows with the fields of the real files, and return the flags."""
    sums = [{"query": f"What is {n} + 1?", "response": f"It is {n + 1}. The answer is: {n + 1}"} for n in range(130)]
    problems = [{"question": f"Ann has {n} pens and buys 2. How many?", "answer": f"#### {n + 2}"} for n in range(3)]
    return ("--metamath_file", write_rows(tmp_path / "metamath.jsonl", sums),
            "--gsm8k_file", write_rows(tmp_path / "gsm8k.jsonl", problems), "--out_dir", tmp_path / "out")  # fmt: skip


@pytest.fixture
def start_quickly(monkeypatch, python) -> None:
    """Run the steps of the study with an interpreter that starts at once."""
    monkeypatch.setattr(sys, "executable", python)


@pytest.mark.usefixtures("start_quickly")
def test_a_table_is_made_from_raw_rows_and_again_only_for_other_settings(run_script, files, tmp_path):
    code, text, _ = run_script("studies/paper_7b.py", *SMALL, *files)
    assert code == 0
    assert "**A smaller study than the paper's** (limit 2, max_steps 1" in text
    summary = json.loads((tmp_path / "out/results/gsm8k-aligner1/summary.json").read_text())
    low, high = summary["interval"]
    assert f"| Aligner, N = 1 | accuracy | {summary['accuracy']:.3f} | {low:.3f} to {high:.3f} | 2 | 0.053 |" in text
    assert text == (tmp_path / "out/report.md").read_text()
    rows = list(csv.DictReader((tmp_path / "out/report.csv").open()))
    assert [(row["table"], row["row"], row["paper"]) for row in rows] == [("fig5_right", "Aligner, N = 1", "0.053")]
    assert (tmp_path / "out/fig5_right.png").read_bytes().startswith(b"\x89PNG")

    code, second_text, log = run_script("studies/paper_7b.py", *SMALL, *files)
    assert (code, second_text) == (0, text)
    assert log.count(": complete\n") == 3

    # other settings: the evaluation is not complete, data and training are
    code, text, log = run_script("studies/paper_7b.py", *SMALL, *files, "--limit", 3)
    assert code == 0 and log.count(": complete\n") == 2
    assert json.loads((tmp_path / "out/results/gsm8k-aligner1/summary.json").read_text())["n"] == 3
    assert "smaller study than the paper's** (limit 3," in text and " | 3 | 0.053 |" in text

    # other data or another base: the trainer refuses to continue
    rows = (tmp_path / "metamath.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(rows[:120]))
    other_data = ("--metamath_file", tmp_path / "other.jsonl")
    other_base = ("--checkpoint_dir", BASE.with_name("microworld-aloud"))
    for change in (other_data, other_base):
        code, out, err = run_script("studies/paper_7b.py", *SMALL, *files, *change)
        assert (code, out) == (1, "") and ": complete\n" not in err
        assert "(train aligner1 on metamath) ended with exit code 1" in err
        assert err.endswith(f"with other settings, delete {tmp_path}/out/runs/metamath-aligner1 first.\n")


def test_a_step_is_complete_only_for_the_same_command(tmp_path):
    done = tmp_path / "summary.json"
    done.touch()
    step = study.Step("x", ["evaluate/x.py", "--adapter", "a"], done)
    for further, complete in (([], True), (["--limit", "8"], False), (["--judge_url", "u"], True)):
        assert step.complete({"x": step.command + further}) is complete


@pytest.mark.usefixtures("start_quickly")
def test_a_failing_step_is_named_and_ends_the_study(run_script, files, tmp_path):
    write_rows(tmp_path / "metamath.jsonl", [{"query": "What is 1 + 1?"}])
    code, out, err = run_script("studies/paper_7b.py", *SMALL, *files)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: Step 1 of 3 (prepare metamath) ended with exit code 1;")


def test_a_dry_run_lists_commands_that_the_scripts_accept(run_script):
    from test_recipes import ROOT, parse

    body = {"max_tokens": None, "max_completion_tokens": 8192}
    judge = ("--judge_url", "http://127.0.0.1:1/v1", "--judge_body", json.dumps(body), "--judge_key_env", "MY_KEY")
    code, out, err = run_script("studies/paper_7b.py", "--dry_run", "--checkpoint_dir", BASE, *judge)
    assert code == 0
    commands = [shlex.split(line, comments=True)[1:] for line in out.splitlines()]
    assert len(commands) == len({tuple(words) for words in commands}) > 30
    for script, *words in commands:
        parsed = parse(ROOT / script, words)
        if "--judge_url" in words:
            assert (parsed.judge_body, parsed.judge_key_env) == (body, "MY_KEY")
    # 6 comparisons in both orders, 4 of 80 and 2 of 83 questions, and the grades of 4 methods' answers to the 80
    assert "GPU hours predicted" in err and "gets 1,292 requests" in err
    assert out.count(f"--judge_cache {Path('out/paper_7b/judgements.jsonl')}") == 6


def test_the_parameter_count_is_exact():
    assert study.Study(study.Settings(checkpoint_dir=Path("/nowhere")), ()).parameters == 6_738_415_616  # Llama 2 7B


@pytest.mark.parametrize("dataset", study.TRAINING)
def test_memory_is_predicted_for_the_default_length_of_the_rows(dataset):
    def gigabytes(max_seq_length: int | None = None) -> float:
        settings = study.Settings(checkpoint_dir=Path("/nowhere"), max_seq_length=max_seq_length)
        return study.Study(settings, ("lora",)).train("lora", dataset)[-1].gigabytes()

    script = study.Study(study.Settings(), ()).prepare(dataset).command[0]
    default = importlib.import_module(script.removesuffix(".py").replace("/", ".")).Settings.max_seq_length
    assert gigabytes() == gigabytes(default) != gigabytes(2 * default)


def test_predictions_are_those_of_the_pages():
    planned = study.Study(study.Settings(checkpoint_dir=Path("/nowhere")), ())
    sft, dpo = (planned.train("aligner1", dataset)[-1] for dataset in ("alpaca", "beaver_dpo"))
    assert f"{sft.gigabytes():.1f}" == "25.1" and f"{dpo.gigabytes():.1f}" == "36.7"
    # 3 epochs forward and backward, and the reference once forward
    assert dpo.hours == pytest.approx((3 * 4 + 2) * 6_738_415_616 * 160_000 * 300 / 350e12 / 3600)


def test_a_figure_of_earlier_results_is_deleted_if_nothing_is_judged(tmp_path):
    results = {"pairs": {"all": {"adjusted_rate": 0.5, "interval": [0.4, 0.6], "n": 80}}}
    cell = study.Cell("Aligner, N = 1 against LoRA", "adjusted rate", tmp_path / "summary.json", study.read_pairs)
    for summary in (results, {}):
        cell.summary.write_text(json.dumps(summary))
        study.report(study.Settings(out_dir=tmp_path), {"2": [cell]})
        assert (tmp_path / "2.png").exists() == bool(summary)


def test_results_without_a_judge_are_incomplete_if_one_is_needed(tmp_path):
    def step(**judge) -> study.Step:
        plan, _ = study.TABLES["2"].plan(study.Study(study.Settings(out_dir=tmp_path, **judge), ("aligner1", "lora")))
        return plan[-1]

    alone, judged = step(), step(judge_url="http://127.0.0.1:1/v1", judge_model="judge")
    assert not alone.complete({alone.name: alone.command})  # no result
    alone.done.parent.mkdir(parents=True)
    alone.done.write_text("{}")
    assert alone.complete({alone.name: alone.command}) and not judged.complete({alone.name: alone.command})
    assert alone.complete({judged.name: judged.command}) and judged.complete({judged.name: judged.command})
    other = {judged.name: step(judge_url="http://127.0.0.1:1/v1", judge_model="other").command}
    assert not judged.complete(other)
    judged.remove_judged({judged.name: [*alone.command[:-1], "x"]})
    assert alone.done.exists()
    judged.remove_judged(other)
    assert not alone.done.exists()
    assert not alone.complete({})
    assert study.read_pairs({"benchmark": "vicuna"}) == (None, None, None)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--methods", "aligner2"), "There is no method 'aligner2'; choose from aligner1, aligner10, "),
        (("--table", "2", "--methods", "aligner1"), "--table 2 compares Aligners with other methods; "),
        (("--table", "2", "--methods", "aligner300"), "--table 2 compares Aligners with other methods; "),
        (("--judge_url", "localhost:8000"), "--judge_url is not an address such as "),
        (("--judge_url", "http://127.0.0.1:1/v1"), "--judge_url needs the name of a model there; give --judge_model"),
        (
            ("--judge_url", "http://127.0.0.1:1/v1", "--judge_model", "m", "--judge_key_env", "sk-1"),
            "--judge_key_env is the name of an environment variable, not the key; set the key there.",
        ),
        (("--checkpoint_dir", "/nowhere"), "There is no base model at /nowhere; convert one with "),
    ],
)
def test_invalid_flags_raise_a_clear_error(refused, flags, sentence):
    assert refused("studies/paper_7b.py", *flags).startswith(sentence)


def test_all_tables_are_those_that_the_methods_allow(run_script):
    code, out, err = run_script("studies/paper_7b.py", "--dry_run", "--methods", "aligner1", "aligner10")
    assert code == 0 and "metamath" in out and "beaver" not in out
    assert "note: table 2 is left out: it compares Aligners with other methods, and --methods lacks one." in err
