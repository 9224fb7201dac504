"""lm-evaluation-harness gives the same results on MMLU and GSM8K as this project, question by question."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chat_models import write_model

from evaluate import gsm8k, harness, mmlu
from evaluate.common import load
from evaluate.harness import HarnessModel, read_options, shared_rows
from evaluate.settings import ModelSettings
from lit_llama.model import LLaMA
from lit_llama.prompts import get_prompt_style
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError

ROOT = Path(__file__).parents[1]
SCRIPT = "evaluate/harness.py"
MICROWORLD = ROOT / "checkpoints/microworld"
SHORT = ROOT / "aligner_weights/microworld-short-n1"
MAX_NEW_TOKENS = 12

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not INSTALLED, reason="lm_eval is not installed; see requirements-harness.txt")


def write_task(folder: Path, name: str, rows: list[dict], **task: object) -> None:
    """Write a task file and its rows, with `prompt` as the question."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, "doc_to_text": "{{prompt}}", **task}))


def run(folder: Path, task: str, **settings: object) -> list[dict]:
    """Evaluate a task and return the records in the order of the rows."""
    output_dir = folder / f"out-{task}"
    harness.main(
        harness.Settings(
            tasks=(task,), include_path=folder, output_dir=output_dir, checkpoint_dir=MICROWORLD, **settings
        )
    )
    records = [json.loads(line) for line in (output_dir / "answers.jsonl").read_text().splitlines()]
    return sorted(records, key=lambda record: int(record["id"].split("/")[1]))


@needs_lm_eval
def test_mmlu_results_equal_those_of_evaluate_mmlu(shared, tmp_path, monkeypatch):
    subjects = ("abstract_algebra", "global_facts")
    data_file = shared / "data/benchmarks/mmlu/mmlu.zip"
    settings = mmlu.Settings(
        checkpoint_dir=MICROWORLD, data_file=data_file, subjects=subjects, shots=0, output_dir=tmp_path / "ours"
    )
    summary = mmlu.main(settings)
    ours = [json.loads(line) for line in (tmp_path / "ours/answers.jsonl").read_text().splitlines()]
    assert len(ours) == summary["n"] > 190
    rows = [{"prompt": r["prompt"], "gold": "ABCD".index(r["gold"])} for r in ours]
    metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    write_task(
        tmp_path, "mmlu_two", rows,
        output_type="multiple_choice", doc_to_choice=list("ABCD"), doc_to_target="gold", metric_list=[metric],
        metadata={"version": 2.0},
    )  # fmt: skip
    n_rows = []
    span_logps = harness.span_logps
    monkeypatch.setattr(harness, "span_logps", lambda m, rows, s: n_rows.append(len(rows)) or span_logps(m, rows, s))
    theirs = run(tmp_path, "mmlu_two")
    assert sum(n_rows) == len({r["prompt"] for r in ours})  # one row per question scores all four letters
    for a, b in zip(ours, theirs, strict=True):
        logps = [float(response[0][0]) for response in b["resps"]]
        assert a["prompt"] == b["prompt"]
        assert logps == pytest.approx(list(a["logps"].values()), abs=1e-4)
        assert (a["predicted"] == a["gold"]) == (b["acc"] == 1)
    report = json.loads((tmp_path / "out-mmlu_two/summary.json").read_text())
    assert report["num_fewshot"] == {"mmlu_two": 0} and report["task_versions"] == {"mmlu_two": 2.0}
    assert report["tasks"]["mmlu_two"]["acc,none"] == pytest.approx(summary["accuracy"])
    assert report["n"] == {"mmlu_two": len(ours)} and report["truncated"] == 0
    assert f"| mmlu_two | acc | none | {len(ours)} | 0 | 2.0 |" in (tmp_path / "out-mmlu_two/summary.md").read_text()


@needs_lm_eval
def test_gsm8k_answers_with_an_adapter_equal_those_of_evaluate_gsm8k(shared, tmp_path):
    tokenizer, lines = Tokenizer(MICROWORLD), (shared / "data/gsm8k_test.jsonl").read_text().splitlines()
    short = [line for line in lines if len(tokenizer.encode(json.loads(line)["question"])) < 180][:50]
    (tmp_path / "rows.jsonl").write_text("\n".join(short))
    settings = gsm8k.Settings(
        checkpoint_dir=MICROWORLD, adapter=SHORT, data_file=tmp_path / "rows.jsonl", max_new_tokens=MAX_NEW_TOKENS,
        output_dir=tmp_path / "ours",
    )  # fmt: skip
    summary = gsm8k.main(settings)
    ours = [json.loads(line) for line in (tmp_path / "ours/answers.jsonl").read_text().splitlines()]
    ours.sort(key=lambda record: record["id"])
    assert len(ours) == 50
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    write_task(
        tmp_path, "gsm8k_50", [{"prompt": r["prompt"], "gold": r["gold"]} for r in ours],
        output_type="generate_until", doc_to_target="{{gold}}", metric_list=[metric],
        generation_kwargs={"until": ["### Instruction"], "max_gen_toks": MAX_NEW_TOKENS, "do_sample": False},
    )  # fmt: skip
    theirs = run(tmp_path, "gsm8k_50", adapter=SHORT, batch_size=8)
    for a, b in zip(ours, theirs, strict=True):
        assert a["prompt"] == b["prompt"]
        assert b["resps"][0][0].strip() == a["answer"]
        assert gsm8k.extract_answer(b["resps"][0][0]) == a["extracted"]
    assert len({record["answer"] for record in ours}) > 5
    report = json.loads((tmp_path / "out-gsm8k_50/summary.json").read_text())
    assert report["mean_tokens"] == summary["mean_tokens"] and report["ended_share"] == summary["ended_share"]


def sequence_logp(network: LLaMA, tokens: list[int], n_new: int) -> float:
    """Return the log-probability of the last `n_new` tokens, from a plain forward pass."""
    with torch.no_grad():
        logps = network(torch.tensor([tokens[:-1]]))[0, :, : network.config.vocab_size].log_softmax(-1)
    return logps.gather(1, torch.tensor(tokens[1:])[:, None])[-n_new:].sum().item()


@needs_lm_eval
def test_texts_and_contexts_longer_than_the_model_allows(base_dir):
    Instance = pytest.importorskip("lm_eval.api.instance").Instance
    model = HarnessModel(load(ModelSettings(checkpoint_dir=base_dir)))
    tokenizer, network = model.evaluated.tokenizer, model.evaluated.model
    text = "the cat sat on the mat and the dog ate the hat" * 4
    ids, limit = tokenizer.encode(text), network.max_tokens
    assert limit < len(ids) <= 2 * limit
    parts = [([tokenizer.bos_id, *ids[:limit]], limit), (ids[-limit - 1 :], len(ids) - limit)]  # tokens, scored
    expected = sum(sequence_logp(network, tokens, n_new) for tokens, n_new in parts)
    (rolling,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    assert rolling == pytest.approx(expected, rel=1e-5)

    requests = [Instance("loglikelihood", {}, (text, " the cat"), 0), Instance("loglikelihood", {}, ("the", " cat"), 1)]
    (truncated, _), (fitting, _) = model.loglikelihood(requests, disable_tqdm=True)
    assert model.truncated == 1
    n_new = len(tokenizer.encode(f"{text} the cat")) - len(ids)
    assert truncated == pytest.approx(sequence_logp(network, tokenizer.encode(f"{text} the cat")[-limit - 1 :], n_new))
    the, the_cat = (tokenizer.encode(t, bos=True) for t in ("the", "the cat"))
    assert fitting == pytest.approx(sequence_logp(network, the_cat, len(the_cat) - len(the)))


def test_a_row_is_shared_with_its_prefixes():
    rows = shared_rows([(1, 2), (1, 2, 3), (1, 2), (1, 4), (2,), (1,)])
    assert {row: sorted(members) for row, members in rows.items()} == {(2,): [4], (1, 4): [3], (1, 2, 3): [0, 1, 2, 5]}


def test_generation_options():
    sampling, stop = read_options({"until": "\n", "do_sample": False, "temperature": 0.7, "max_gen_toks": 5})
    assert (sampling.temperature, sampling.max_new_tokens, stop) == (0, 5, ("\n",))
    sampling, stop = read_options({"until": ["a", "b"], "do_sample": True, "top_p": 0.9})
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens, stop) == (1, 0.9, 256, ("a", "b"))


@needs_lm_eval
def test_tasks_are_rendered_in_a_prompt_style():
    style_model = HarnessModel(load(ModelSettings(checkpoint_dir=MICROWORLD, prompt_style="hh")))
    turns = [("system", "Be kind."), ("user", "One?"), ("assistant", "1"), ("user", "Two?")]
    history = [{"role": role, "content": text} for role, text in turns]
    expected = "Human: Be kind.\n\nOne? Assistant: 1 Human: Two? Assistant: "
    assert style_model.apply_chat_template(history) == expected
    history.append({"role": "assistant", "content": "It"})
    assert style_model.apply_chat_template(history, add_generation_prompt=False) == f"{expected}It"


@pytest.mark.parametrize("style", ["alpaca", "orca", "beaver", "hh"])
@pytest.mark.parametrize("kind", ["microworld", "bytes"])
def test_answers_in_a_prompt_style_have_the_tokens_of_training(kind, style, tmp_path):
    tokenizer = Tokenizer(MICROWORLD if kind == "microworld" else write_model(tmp_path, "chatml"))
    style = get_prompt_style(style)
    model = HarnessModel(lambda: SimpleNamespace(tokenizer=tokenizer, style=style))
    history = [{"role": "user", "content": "Which letter?"}]
    prompt = model.apply_chat_template(history)

    def trained(response: str) -> list[int]:
        return tokenizer.encode_response(prompt, response)[:-1]  # without EOS

    prompt_ids = tokenizer.encode(prompt, bos=True)
    for continuation in ("The cat", " The cat"):
        assert model._encode_pair(prompt, continuation) == (prompt_ids, trained("The cat"))
    assert model._encode_context(prompt) == prompt_ids
    history.append({"role": "assistant", "content": "The letter is"})
    context = model.apply_chat_template(history, add_generation_prompt=False)
    for continuation in ("A", " A"):
        begun, rest = model._encode_pair(context, continuation)
        assert begun + rest == prompt_ids + trained("The letter is A")
        assert begun == model._encode_context(context) == prompt_ids + trained("The letter is")


def test_the_context_of_a_task_without_a_question_is_empty():
    model = HarnessModel(lambda: SimpleNamespace(style=get_prompt_style("alpaca")))
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": ""}]
    assert model.apply_chat_template(asked) == ""
    asked.append({"role": "assistant", "content": "It"})
    assert model.apply_chat_template(asked, add_generation_prompt=False) == "It"
    asked.append({"role": "user", "content": ""})  # after a few-shot example
    with pytest.raises(UserError, match="A task has few-shot examples but no questions"):
        model.apply_chat_template(asked)


@needs_lm_eval
def test_texts_of_tasks_without_a_question_are_scored_in_every_prompt_style(tmp_path):
    metric = {"metric": "byte_perplexity"}
    write_task(
        tmp_path, "texts", [{"text": "The cat sat."}, {"text": "The dog ate."}],
        output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}", metric_list=[metric],
    )  # fmt: skip
    scored = [run(tmp_path, "texts", prompt_style=style, overwrite=True) for style in ("plain", "alpaca")]
    assert [r["resps"] for r in scored[0]] == [r["resps"] for r in scored[1]]


@needs_lm_eval
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "There is nothing to evaluate; name tasks with --tasks."),
        (("--tasks", "toys", "--include_path", "nowhere"), "There is no folder nowhere"),
        (("--tasks", "toys", "--include_path", "."), "There is no task 'toys' in .; did you mean toy?"),
        (("--tasks", "toy", "--include_path", ".", "--limit", "0"), "limit is 0; it must be 1 or more."),
    ],
)
def test_invalid_input_gives_a_one_line_error(flags, sentence, run_script, tmp_path, monkeypatch):
    write_task(tmp_path, "toy", [], output_type="multiple_choice")
    monkeypatch.chdir(tmp_path)
    code, _, err = run_script(SCRIPT, "--checkpoint_dir", MICROWORLD, *flags)
    assert code == 1 and f"error: {sentence}" in err and "Traceback" not in err


class Task:
    """A task of lm_eval, with attributes such as UNSAFE_CODE."""

    def __init__(self, num_fewshot: int = 0, **attributes: bool) -> None:
        self.num_fewshot = num_fewshot
        self.__dict__.update(attributes)

    def get_config(self, name: str) -> int:
        return getattr(self, name)


def replace_harness(monkeypatch, simple_evaluate: Callable, loaded: Task | Exception | None = None) -> None:
    """Replace the harness by one with a single task, and the error when its data is loaded."""

    class TaskManager:
        def __init__(self, **_: object) -> None:
            self.all_tasks = ["toy"]

        def load(self, names: list[str]) -> dict:
            if isinstance(loaded, Exception):
                raise loaded
            return {"tasks": {"toy": loaded}}

    monkeypatch.setattr(harness, "lm_eval", SimpleNamespace(__version__="0", simple_evaluate=simple_evaluate))
    monkeypatch.setattr(harness, "TaskManager", TaskManager, raising=False)


def test_a_repeated_evaluation_replaces_the_records(base_dir, tmp_path, monkeypatch):
    """The task file may have changed, which the settings do not show."""
    answers = [("the cat", 0.0), ("the dog", 0.0), ("the dog", 1.0)]

    def simple_evaluate(model, **_):
        prompt, acc = answers.pop(0)
        row = {"filter": "none", "doc_id": 0, "arguments": [(prompt, " a")], "metrics": ["acc"], "acc": acc}
        row |= {"doc": {}, "target": "a", "resps": [], "filtered_resps": []}
        return {
            "samples": {"toy": [row]},
            "results": {"toy": {"acc,none": acc}},
            "n-samples": {"toy": {"effective": 1}},
            "n-shot": {"toy": 3},
            "versions": {"toy": 1.0},
        }

    replace_harness(monkeypatch, simple_evaluate)
    settings = harness.Settings(checkpoint_dir=base_dir, tasks=("toy",), output_dir=tmp_path)
    for prompt, acc in answers[:]:
        summary = harness.main(settings)
        (record,) = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
        assert (record["prompt"], record["acc"]) == (prompt, acc) and summary["tasks"]["toy"]["acc,none"] == acc
    mine = '{"answer": "mine"}\n'
    (tmp_path / "answers.jsonl").write_text(mine)
    with pytest.raises(UserError, match="was not written by an evaluation"):
        harness.main(settings)
    assert (tmp_path / "answers.jsonl").read_text() == mine


def load_tasks(model, *, tasks, task_manager, **_) -> None:
    """The beginning of `simple_evaluate`."""
    task_manager.load(tasks)


UNSAFE = "runs the code that the model writes; to allow this, pass --confirm_run_unsafe_code true."


@pytest.mark.parametrize(
    ("loaded", "sentence"),
    [
        (
            ConnectionError("Couldn't reach 'me/toy' on the Hub.\nMore text."),
            "Cannot load toy (Couldn't reach 'me/toy' on the Hub); check the network and the task files.",
        ),
        (ValueError('*****\nSet os.environ["HF_ALLOW_CODE_EVAL"] = "1".'), f"A task of toy {UNSAFE}"),
        (Task(UNSAFE_CODE=True), f"The task toy {UNSAFE}"),
        (Task(MULTIMODAL=True), "The task toy asks about images or sound; the model reads only text."),
    ],
)
def test_a_task_that_cannot_be_run_gives_a_one_line_error(loaded, sentence, base_dir, tmp_path, monkeypatch):
    replace_harness(monkeypatch, load_tasks, loaded)
    monkeypatch.setattr(harness, "load", lambda settings: pytest.fail("the model was loaded first"))
    settings = harness.Settings(checkpoint_dir=base_dir, tasks=("toy",), output_dir=tmp_path)
    with pytest.raises(UserError) as error:
        harness.main(settings)
    assert str(error.value) == sentence


def test_generated_code_runs_only_with_permission(base_dir, tmp_path, monkeypatch):
    def simple_evaluate(model, *, confirm_run_unsafe_code, **given):
        load_tasks(model, **given)
        raise StopIteration(confirm_run_unsafe_code, os.environ.get(harness.ALLOW_CODE))

    replace_harness(monkeypatch, simple_evaluate, Task(UNSAFE_CODE=True))
    monkeypatch.setenv(harness.ALLOW_CODE, "0")
    settings = harness.Settings(checkpoint_dir=base_dir, tasks=("toy",), output_dir=tmp_path)
    with pytest.raises(UserError, match="runs the code"):
        harness.main(settings)
    with pytest.raises(StopIteration) as stop:
        harness.main(replace(settings, confirm_run_unsafe_code=True))
    assert stop.value.args == (True, "1")


def test_a_task_without_worked_examples_ignores_their_number(capsys):
    tasks = {"tasks": {"none": Task(0), "some": Task(4)}}
    assert harness.load_tasks(harness.Settings(num_fewshot=5), lambda names: tasks, ["all"]) is tasks
    assert capsys.readouterr().err == "note: --num_fewshot is ignored for none, defined to have no few-shot examples.\n"
    harness.load_tasks(harness.Settings(), lambda names: tasks, ["all"])
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(INSTALLED, reason="lm_eval is installed")
def test_without_lm_eval_the_error_names_its_requirements(run_script):
    code, _, err = run_script(SCRIPT, "--tasks", "arc_easy")
    assert code == 1
    assert err == "error: The package lm_eval is missing; install it with pip install -r requirements-harness.txt.\n"


@pytest.mark.parametrize("script", ["gsm8k", "mmlu", "vicuna", "safety", "harness", "microworld"])
def test_scripts_start_if_the_library_evaluate_is_installed(script, tmp_path):
    make_library(tmp_path)
    result = run_python(tmp_path, f"evaluate/{script}.py", "--help")
    assert result.returncode == 0 and "output_" in result.stdout, result.stderr


def test_the_library_evaluate_can_still_be_imported(tmp_path):
    make_library(tmp_path)
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import evaluate, evaluate.hub\nfrom evaluate.gsm8k import extract_answer\n"
        "print(extract_answer('#### 7'), evaluate.load('exact_match'), evaluate.hub.NAME, hasattr(evaluate, 'nothing'))"
    )
    result = run_python(tmp_path, "-c", code)
    assert result.stdout == "7 the library's exact_match hub False\n", result.stderr


def make_library(folder: Path) -> None:
    """Write a package `evaluate` with a function `load` and a module `hub`."""
    (folder / "evaluate").mkdir()
    (folder / "evaluate/loading.py").write_text('def load(name):\n    return f"the library\'s {name}"\n')
    (folder / "evaluate/hub.py").write_text("NAME = 'hub'\n")
    (folder / "evaluate/__init__.py").write_text("from .loading import load\n")


def run_python(library: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(library)}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
