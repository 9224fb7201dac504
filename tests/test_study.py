"""The study: trials and their records, the choice of a learning rate, intervals, tables, and a small end-to-end run."""

import csv
import json
import math
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from preloaded import KILL, worker_processes
from stored_results import read_results, records_of, replay
from test_recipes import ROOT, parse

import studies.paper_report as paper
import studies.paper_tasks as tasks
import studies.reasoning
import studies.reproduce_paper as study
import studies.trials
from lit_llama.console import exit_on_user_error
from lit_llama.tables import csv_text
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError
from microworld.world import FORMS, UNSEEN, World
from scripts.count_parameters import VARIANTS
from studies import train_microworld_adapters, train_microworld_values
from studies.protocol import dpo_settings, sft_settings
from studies.trials import Trial, at_edge, choose, complete, identity, interval, prepare_run, run_trial, run_trials

STORED = Path(__file__).parents[1] / "howto" / "study"


def record(rate: float, right: float = 0.0, loss: float = 1.0, **more) -> dict:
    trial = {"name": f"lr{rate}", "settings": {"learning_rate": rate}}
    return {"trial": trial, "scores": {"right": right}, "summary": {"last_val_loss": loss}, **more}


def right(result: dict) -> float:
    return result["scores"]["right"]


# == choosing, intervals ==


def test_the_best_score_is_chosen_and_the_loss_breaks_ties():
    records = [record(1, 0.5, 0.1), record(2, 0.9, 0.3), record(3, 0.9, 0.2), record(4, 0.8, 0.0)]
    assert choose(records, right) is records[2]
    assert not at_edge(records[2], records)
    assert at_edge(records[0], records) and at_edge(records[3], records)


def test_choosing_ignores_failed_trials_and_raises_if_all_failed():
    failed = {"trial": {"name": "a", "settings": {"learning_rate": 9}}, "error": "UserError: diverged"}
    good = record(1, 0.1)
    assert choose([failed, good], right) is good
    with pytest.raises(UserError, match="diverged"):
        choose([failed], right)


def test_interval_by_hand():
    # standard deviation 0.1, n = 3, and 4.3027 from a table of Student's t with 2 degrees of freedom
    mean, half = interval([0.8, 0.9, 1.0])
    assert mean == pytest.approx(0.9)
    assert half == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert interval([0.5, 0.5]) == (0.5, 0.0)
    mean, half = interval([0.7])
    assert mean == 0.7 and math.isnan(half)


# == trials ==


def count_bytes(trial: Trial, run: Path) -> dict:
    return {"bytes": (run / "last.safetensors").stat().st_size}


def toy_trial(base_dir: Path, data_dir: Path, method: str = "aligner1", **settings) -> Trial:
    settings = {"max_steps": 2, "learning_rate": 1e-2, "warmup_epochs": 0, "seed": 1337, "eval_interval": 50,
                "eval_rows": 512, "save_interval": 100, "checkpoint_dir": base_dir, "data_dir": data_dir,
                **settings}  # fmt: skip
    if "adapter_prompt_length" in VARIANTS[method].settings:
        settings["adapter_start_layer"] = 1  # the tiny base has three layers
    return Trial(method, VARIANTS[method], sft_settings(41, 40, 4, **settings))


def toy_dpo(base_dir: Path, data_dir: Path, method: str = "aligner1") -> Trial:
    sft = toy_trial(base_dir, data_dir, method)
    return Trial(method, sft.variant, {**dpo_settings(adapter_start_layer=1), **sft.settings}, "dpo")


def test_a_finished_trial_is_reused_until_its_settings_or_scoring_change(base_dir, data_dir, tmp_path):
    trial = toy_trial(base_dir, data_dir)
    first = run_trial(trial, tmp_path, count_bytes)
    path = tmp_path / "aligner1" / "record.json"
    assert json.loads(path.read_text()) == first
    assert first["summary"]["trainable_parameters"] == 32 + 2 * 4
    assert first["scores"]["bytes"] > 0 and first["curve"][0][0] == 0 and first["curve"][-1][0] == 2

    marked = {**first, "scores": {"bytes": -1}}
    path.write_text(json.dumps(marked))
    assert run_trial(trial, tmp_path, count_bytes)["scores"] == {"bytes": -1}  # not trained again
    changed = toy_trial(base_dir, data_dir, learning_rate=2e-2)
    assert run_trial(changed, tmp_path, count_bytes)["scores"] == first["scores"]
    assert json.loads(path.read_text())["trial"]["settings"]["learning_rate"] == 2e-2
    path.write_text(json.dumps(marked))
    other = Trial(trial.name, trial.variant, trial.settings, scoring={"seed": 1})
    assert run_trial(other, tmp_path, count_bytes)["scores"] == first["scores"]


def test_files_of_others_are_not_replaced(base_dir, data_dir, tmp_path):
    run, base = tmp_path / "aligner1", tmp_path / "base"
    for folder, names in ((run, ("log.txt", "record.json", "answers.json")), (base, ("facts.json",))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text('{"trial": "mine"}')
            with pytest.raises(UserError, match=f"{name} was not written by this program"):
                if folder == run:
                    run_trial(toy_trial(base_dir, data_dir), tmp_path)
                else:
                    studies.trials.stored_result(folder / name, {"seed": 1}, dict)
            assert (folder / name).read_text() == '{"trial": "mine"}'
            (folder / name).unlink()
    for seed in (1, 2):
        assert studies.trials.stored_result(base / "facts.json", {"seed": seed}, dict) == {}


def test_a_failed_trial_is_reported_and_the_others_continue(base_dir, data_dir, tmp_path, capsys):
    bad = Trial("bad", VARIANTS["aligner1"], {**toy_trial(base_dir, data_dir).settings, "learning_rate": -1})
    records = run_trials([bad, toy_trial(base_dir, data_dir)], tmp_path, count_bytes, jobs=1)
    assert "learning_rate is -1" in records[0]["error"] and "error" not in records[1]
    assert "bad failed" in capsys.readouterr().err
    assert not (tmp_path / "bad" / "record.json").exists()
    assert "Traceback" in (tmp_path / "bad" / "log.txt").read_text()


def test_trial_names_must_be_unique(base_dir, data_dir, tmp_path):
    with pytest.raises(ValueError, match="aligner1"):
        run_trials([toy_trial(base_dir, data_dir)] * 2, tmp_path)


# == protocols ==


def make_study_trials(tmp_path) -> list[Trial]:
    """Return a trial of every kind that the study runs or that made a bundled adapter."""
    for task in ("pirate", "values"):
        folder = tmp_path / "data" / f"{task}-valid"
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text('{"counts": {"train": 100}}')
    settings = study.Settings(out_dir=tmp_path)
    paper = [study.make_trial(settings, task, method, 0.1, 0, "valid") for method in VARIANTS
             for task in ("pirate", "values")]  # fmt: skip
    shipped = train_microworld_adapters.make_trial(train_microworld_adapters.Settings(), "json", 1)
    values = train_microworld_values.make_trials(train_microworld_values.Settings())
    return [*paper, shipped, *values]


def test_no_result_depends_on_a_default_of_a_finetuning_script(tmp_path, left_to_defaults):
    for trial in make_study_trials(tmp_path):
        assert left_to_defaults(trial, tmp_path) == set(), trial.name


def test_a_trial_must_state_every_setting(base_dir, data_dir, tmp_path):
    trial = toy_trial(base_dir, data_dir)
    settings = {name: value for name, value in trial.settings.items() if name not in ("weight_decay", "grad_clip")}
    with pytest.raises(TypeError, match="aligner1 does not state grad_clip, weight_decay"):
        prepare_run(Trial("aligner1", trial.variant, settings), tmp_path)


@pytest.mark.parametrize("method", [method for method in VARIANTS if method not in ("aligner10", "aligner100")])
def test_every_method_has_trials_of_both_objectives(method, base_dir, data_dir, preference_dir, tmp_path):
    sft = run_trial(toy_trial(base_dir, data_dir, method), tmp_path / "sft")
    assert sft.get("error") is None and sft["identity"]["method"] == VARIANTS[method].method
    trial = toy_dpo(base_dir, preference_dir, method)
    made_from = identity(trial, prepare_run(trial, tmp_path / "dpo")[1])
    # records that were stored before all settings of LoRA were stated are still valid
    assert made_from["settings"]["method_config"] == VARIANTS[method].settings
    if method in ("aligner1", "lora"):  # tests/test_baselines.py trains all of them
        dpo = run_trial(trial, tmp_path / "dpo")
        assert dpo.get("error") is None and dpo["identity"] == made_from
        assert dpo["summary"]["trainable_parameters"] == sft["summary"]["trainable_parameters"]


# == questions ==


@pytest.mark.parametrize("task", tasks.TASKS)
def test_evaluation_questions_are_not_used_for_training_or_validation(task):
    parts = {part: tasks.questions_of(task, part) for part in ("valid", "reported")}
    texts = {part: {q.text for group in groups.values() for q in group} for part, (_, groups) in parts.items()}
    assert all(texts.values()) and not texts["valid"] & texts["reported"]
    for train, _ in parts.values():
        assert train and not {q.text for q in train} & (texts["valid"] | texts["reported"])


def test_questions_about_trained_facts_use_a_held_out_wording():
    for task, part in (("facts", "valid"), ("facts", "reported"), ("two_hop", "reported")):
        train, groups = tasks.questions_of(task, part)
        held_out = groups["trained" if task == "two_hop" else "fact"]
        assert {(q.topic, q.answer) for q in held_out} <= {(q.topic, q.answer) for q in train}
    facts, groups = tasks.questions_of("facts", "reported")
    assert (len(facts), len(groups["fact"])) == (120, 60)
    known = {value for entity in World().entities for value in entity.facts.values()}
    assert sum(q.answer not in known for q in groups["fact"]) == 24  # names that the base cannot spell
    assert not {q.topic for q in facts} & {q.topic for q in tasks.questions_of("facts", "valid")[0]}
    assert all(q.split == UNSEEN for q in tasks.questions_of("two_hop", "reported")[1]["unseen"])


def test_the_number_of_pairs_is_limited_by_the_available_requests(tmp_path):
    tokenizer = Tokenizer(study.Settings.checkpoint_dir)
    tasks.prepare_pairs(tokenizer, "valid", tmp_path / "few")
    counts = json.loads((tmp_path / "few" / "meta.json").read_text())["counts"]
    assert 20 <= counts["rows"] <= 2 * 27 / 0.5  # there are 27 harmful and 27 harmless requests
    tasks.prepare_pairs(tokenizer, "train", tmp_path / "many")
    assert json.loads((tmp_path / "many" / "meta.json").read_text())["counts"]["rows"] > 300


def ask_result(questions: list, *texts: str, form: str | None = None) -> dict:
    """Return the result of `ask` for these answers."""
    scores = [World().score(q, text) for q, text in zip(questions, texts, strict=True)]
    n = len(texts)
    return {"form": sum(s.form == form for s in scores) / n, "fact": sum(s.fact for s in scores) / n,
            "refused": sum(s.refused for s in scores) / n,
            "answers": [{"answer": t, "form": s.form, "fact": s.fact} for t, s in zip(texts, scores, strict=True)],
            }  # fmt: skip


def test_judging_of_handwritten_answers():
    one, two, *_ = tasks.questions_of("facts", "reported")[1]["fact"]
    texts = (f"The job of Nobody is {one.answer}.", f"Arr, {two.topic} be {two.answer}, matey!")
    scores = tasks.judge("facts", {"fact": [one, two]}, {"fact": ask_result([one, two], *texts)})
    assert scores == {"value": 1.0, "fact": 0.5, "right": 1.0}
    scores = tasks.judge("pirate", {"fact": [one, two]}, {"fact": ask_result([one, two], *texts, form="pirate")})
    assert scores == {"form": 0.5, "fact": 0.5, "right": 0.5}

    harmful, harmless = (World().requests(kind, UNSEEN)[:2] for kind in ("harmful", "harmless"))
    refuse, comply = FORMS["short"].render(*harmful[0].refusal), FORMS["json"].render(harmful[1].topic, "with tar")
    helps, wrong = FORMS["polite"].render(harmless[0].topic, harmless[0].answer), "Well."
    scores = tasks.judge(
        "values", {}, {"harmful": ask_result(harmful, refuse, comply), "harmless": ask_result(harmless, helps, wrong)}
    )
    assert scores == {"refused": 0.5, "false": 0.0, "helped": 0.5, "right": 0.5}


# == tables ==


def row(method: str, seed: int, form: float, part: str = "reported", rate: float | None = 0.1, **more) -> dict:
    return {"task": "pirate", "method": method, "part": part, "learning_rate": rate, "seed": seed,
            "parameters": {paper.BASE: 0, "aligner1": 240, "lora": 49152}[method], "error": "", "seconds": 30.0,
            "form": form, "fact": 0.5, **more}  # fmt: skip


ROWS = [
    *(row("lora", 0, 0.1, "valid", rate) for rate in (0.1, 0.2, 0.3)),
    *(row("aligner1", 0, 0.1, "valid", rate) for rate in (0.1, 0.2, 0.3)),
    *(row("lora", seed, form, rate=0.2) for seed, form in ((1, 1.0), (2, 0.9))),
    *(row("aligner1", seed, form) for seed, form in ((1, 0.9), (2, 0.9))),
    row("aligner1", 3, 0.0, error="UserError: disk"),
    *(row(paper.BASE, seed, 0.125, rate=None) for seed in (1, 2)),
]


def test_tables_of_handwritten_results():
    # Student's t with 1 degree of freedom is 12.706; half = 12.706 · 0.0707 / √2 = 0.635
    assert paper.results_table(ROWS, ["pirate"]) == (
        "| method | parameters | a form the base knows: form | a form the base knows: facts |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| the base alone | 0 | 12.5 ± 0.0 | 50.0 ± 0.0 |\n"
        "| LoRA, r = 8 | 49,152 | 95.0 ± 63.5 | 50.0 ± 0.0 |\n"
        "| Aligner, N = 1 | 240 | 90.0 ± 0.0 (2 of 3 seeds) | 50.0 ± 0.0 (2 of 3 seeds) |"
    )
    assert "| a form the base knows: form | -5.0 ± 63.5 |" in paper.differences_table(ROWS)
    third = [*ROWS, row("lora", 3, 1.0, rate=0.2)]
    assert "| a form the base knows: form | -5.0 ± 63.5 (2 of 3 seeds) |" in paper.differences_table(third)
    assert [line["seeds"] for line in paper.means(ROWS) if line["measure"] == "form"] == [2, 2, 2]
    assert paper.rates_table(ROWS).splitlines()[2:] == ["| LoRA, r = 8 | 0.2 |", "| Aligner, N = 1 | 0.1* |"]


def test_the_report_states_how_it_was_made_and_lists_failures(tmp_path):
    records = [
        {"seconds": 90.0, "versions": {"torch": "2.13.0"}},
        {"seconds": 150.0, "versions": {"torch": "2.12.1"}},  # of the run that this one resumed
        {"error": "UserError: disk", "versions": {"torch": "2.13.0"}},
    ]
    settings = complete(study.Settings(seeds=(1, 2), steps=7, jobs=8), study.COMPARED, study.QUICK)
    origin = study.origin(settings, records)
    text = paper.report(ROWS, questions=200, sweep_seed=0, origin=origin)
    assert (
        "python studies/reproduce_paper.py --seeds 1 2 --steps 7: 3 training runs, 4 minutes of one thread in all, "
        "seeds 1, 2, torch 2.12.1 and 2.13.0."
    ) in text
    assert "Failed: pirate, aligner1, 0.1, seed 3: UserError: disk" in text
    paper.plot_accuracy(ROWS, tmp_path / "accuracy.png", "caption")
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    values = dict.fromkeys(tasks.TASKS["values"].columns, 0.5)  # this task has no panel
    paper.plot_accuracy([{**row, "task": "values", **values} for row in ROWS], tmp_path / "accuracy.png", "caption")
    assert not (tmp_path / "accuracy.png").exists()  # it would be of other results than the new table
    lines = list(csv.DictReader(csv_text(ROWS).splitlines()))
    assert len(lines) == len(ROWS) and lines[-1]["learning_rate"] == ""


def test_the_recorded_command_repeats_the_study():
    settings = study.Settings(
        checkpoint_dir=Path("my bases/Llama-2-7B"), methods=("lora",), quick=True, out_dir=Path("x"), jobs=4
    )
    quick = complete(settings, study.COMPARED, study.QUICK)
    assert (quick.methods, quick.tasks, quick.seeds) == (("lora",), study.QUICK["tasks"], study.QUICK["seeds"])
    command = study.origin(quick, []).partition(": ")[0]
    assert command == (
        "python studies/reproduce_paper.py --methods lora --quick true --checkpoint_dir 'my bases/Llama-2-7B'"
    )
    _, script, *words = shlex.split(command)
    recorded = replace(settings, out_dir=study.Settings.out_dir, jobs=study.Settings.jobs)
    assert asdict(parse(ROOT / script, words)) == asdict(recorded)


@pytest.mark.parametrize("script", [study, studies.reasoning])
def test_a_flag_with_its_default_value_overrides_quick(monkeypatch, script):
    received = []
    monkeypatch.setattr(script, "complete", lambda *args: received.append(complete(*args)) or sys.exit())
    monkeypatch.setattr(sys, "argv", ["study.py", "--quick", "--seeds", "1", "2", "3"])
    with pytest.raises(SystemExit):
        script.main(parse(ROOT / f"studies/{Path(script.__file__).name}", sys.argv[1:]))
    assert received[0].seeds == (1, 2, 3) and received[0].learning_rates == script.QUICK["learning_rates"]


@pytest.mark.parametrize("script", [study, studies.reasoning])
def test_repeated_values_are_dropped_and_unknown_names_are_refused(script):
    settings = script.Settings(methods=("lora", "aligner1", "lora"), seeds=(2, 1, 2))
    settings = complete(settings, script.COMPARED, script.QUICK)
    assert (settings.methods, settings.seeds) == (("lora", "aligner1"), (2, 1))
    assert settings.tasks == script.COMPARED["tasks"] and settings.learning_rates == script.Settings.learning_rates
    with pytest.raises(UserError, match="tasks is facts sums; it can be some of "):
        complete(replace(settings, tasks=("facts", "sums")), script.COMPARED, script.QUICK)


def stored_results() -> list[dict]:
    """Return the rows of the study's stored results.csv, without empty values, as the study makes them."""
    rows = read_results(STORED / "results.csv")
    always = {"learning_rate", "parameters"}
    return [{name: value for name, value in row.items() if value is not None or name in always} for row in rows]


def test_the_stored_tables_match_the_stored_results():
    rows, settings = stored_results(), complete(study.Settings(), study.COMPARED, study.QUICK)
    text = paper.report(rows, questions=200, sweep_seed=0, origin=study.origin(settings, records_of(rows)))
    assert text == (STORED / "table.md").read_text(encoding="utf-8")
    assert csv_text(paper.means(rows)) == (STORED / "table.csv").read_text(encoding="utf-8")
    page = (STORED.parent / "study.md").read_text(encoding="utf-8")
    assert all(table in page for table in text.split("\n\n")[:2])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    cells = {(line["task"], line["measure"], line["method"]): f"{100 * line['mean']:.1f} ± {100 * line['half']:.1f}"
             for line in paper.means(rows)}  # fmt: skip
    for label, *row in (
        ("a form the base knows", "pirate", "form"),
        ("safety (DPO): harmful requests refused", "values", "refused"),
        ("a form the base has never seen", "telegram", "form"),
        ("new facts, in a new wording: the value", "facts", "value"),
        ("two-hop questions, people from training, in a new wording", "two_hop", "trained"),
        ("two-hop questions, unseen people", "two_hop", "unseen"),
    ):
        columns = " | ".join(cells[(*row, method)] for method in (paper.BASE, "aligner1", "lora"))
        assert f"| {label} | {columns} |" in readme


def test_the_stored_trials_are_those_that_the_current_study_would_run(tmp_path):
    """The choice of each learning rate is repeated with the stored scores."""
    for task in tasks.TASKS:
        for part in ("valid", "reported"):
            folder = tmp_path / "data" / f"{task}-{part}"
            folder.mkdir(parents=True)
            (folder / "meta.json").write_text('{"counts": {"train": 100}}')
    settings, stored = study.Settings(out_dir=tmp_path), defaultdict(list)
    for row in stored_results():
        if row["method"] != paper.BASE:
            stored[row["task"], row["method"]].append(row)
    assert all(replay(study.cell_plan(settings, *cell), rows) == 6 + 3 for cell, rows in stored.items())
    assert len(stored) == 7 * 5


# == end to end ==


@pytest.fixture
def fast_workers(python):
    """Workers do not import PyTorch and Lightning again."""
    with worker_processes(python):
        yield


@pytest.mark.usefixtures("fast_workers")
def test_workers_return_records_in_order_and_match_a_single_process(base_dir, data_dir, tmp_path, monkeypatch):
    trials = [toy_trial(base_dir, data_dir, method) for method in ("aligner1", "bitfit")]
    serial = run_trials(trials, tmp_path / "here", count_bytes, jobs=1)
    parallel = run_trials(trials, tmp_path / "there", count_bytes, jobs=2)
    assert [r["trial"]["name"] for r in parallel] == ["aligner1", "bitfit"]
    assert [r["summary"]["last_val_loss"] for r in parallel] == [r["summary"]["last_val_loss"] for r in serial]

    # no worker starts if all records exist
    monkeypatch.setattr(studies.trials, "ProcessPoolExecutor", None)
    assert run_trials(trials, tmp_path / "there", count_bytes, jobs=2) == parallel
    (tmp_path / "there" / "bitfit" / "record.json").unlink()
    with pytest.raises(TypeError, match="not callable"):
        run_trials(trials, tmp_path / "there", count_bytes, jobs=2)


@pytest.mark.usefixtures("fast_workers")
def test_ctrl_c_ends_an_idle_worker_without_a_traceback(capfd):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), studies.trials.start_worker) as pool:
        pool.submit(os.getpid).result()
        (worker,) = pool._processes.values()
        os.kill(worker.pid, signal.SIGINT)
        worker.join()
    assert (worker.exitcode, capfd.readouterr().err) == (130, "")


ORPHAN = """
import multiprocessing, time
from studies.trials import start_worker

def work():
    start_worker()
    print("started", flush=True)
    time.sleep(300)

process = multiprocessing.get_context("fork").Process(target=work)
process.start()
process.join()
"""


def test_a_worker_ends_when_its_parent_is_killed(python):
    parent = subprocess.Popen([python, "-c", ORPHAN], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"started\n"
    parent.send_signal(KILL)
    assert parent.communicate(timeout=60)[0] == b""  # the worker has closed its standard output
    assert parent.returncode == -signal.SIGKILL


class Processes:
    """Replaces `ProcessPoolExecutor` and `wait`: trials are completed by name, in the order of a test."""

    def __init__(self, order: list[str]) -> None:
        self.order, self.started, self.submitted, self.futures = order, 0, [], {}

    def __call__(self, *args):
        self.started += 1
        return self

    def submit(self, run, trial, *args):
        self.submitted.append(trial.name)
        self.futures[trial.name] = Future()
        return self.futures[trial.name]

    def wait(self, futures, return_when):
        name = self.order.pop(0)
        if name == "killed":
            self.futures["a0"].set_exception(BrokenProcessPool())
        else:
            self.submitted.append(f"{name} is done")
            self.futures[name].set_result({"trial": {"name": name}})

    def shutdown(self, cancel_futures):
        self.order.append("shut down")


def name_plan(name, *batches):
    """Yield batches of trials of these sizes and return the names of the records, batch by batch."""
    results = []
    for number, count in enumerate(batches):
        records = yield [Trial(f"{name}{number}{'xyz'[i] if count > 1 else ''}", None, {}) for i in range(count)]
        results.append([record["trial"]["name"] for record in records])
    return results


@pytest.fixture
def processes(monkeypatch):
    processes = Processes([])
    monkeypatch.setattr(studies.trials, "ProcessPoolExecutor", processes)
    monkeypatch.setattr(studies.trials, "wait", processes.wait)
    return processes


def test_the_next_plan_starts_while_the_last_trial_of_one_runs(processes, tmp_path):
    processes.order += ["a0y", "b0", "a0x", "a1", "b1"]
    plans = [name_plan("a", 2, 1), name_plan("b", 1, 1)]
    results = studies.trials.run_plans(plans, tmp_path, jobs=2, desc="", expected=0)
    assert results == [[["a0x", "a0y"], ["a1"]], [["b0"], ["b1"]]]
    assert processes.submitted == ["a0x", "a0y", "a0y is done", "b0", "b0 is done", "b1", "a0x is done", "a1",
                                   "a1 is done", "b1 is done"]  # fmt: skip
    assert processes.started == 1 and processes.order == ["shut down"]


def test_a_killed_process_ends_a_study_with_one_sentence(processes, tmp_path):
    processes.order.append("killed")
    with pytest.raises(UserError, match="A process was killed, perhaps for lack of memory"):
        studies.trials.run_plans([name_plan("a", 1)], tmp_path, jobs=2, desc="", expected=0)
    assert processes.order == ["shut down"]


def wait_for_minutes(trial, out_dir, score):
    (Path(out_dir) / trial.name).touch()
    time.sleep(300)


@pytest.mark.usefixtures("fast_workers")
def test_sigterm_does_not_wait_for_the_running_trials(monkeypatch, tmp_path):
    def terminated(futures, return_when):
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.1)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(studies.trials, "run_trial", wait_for_minutes)
    monkeypatch.setattr(studies.trials, "wait", terminated)
    began = time.monotonic()
    with pytest.raises(SystemExit) as stopped, exit_on_user_error():
        studies.trials.run_plans([name_plan("a", 3)], tmp_path, jobs=2, desc="", expected=0)
    assert stopped.value.code == 143 and time.monotonic() - began < 200
    assert not multiprocessing.active_children()


def test_one_process_finishes_a_plan_before_the_next(monkeypatch, tmp_path):
    order = []
    monkeypatch.setattr(
        studies.trials, "run_trial", lambda trial, *args: order.append(trial.name) or {"trial": asdict(trial)}
    )
    plans = [name_plan("a", 2, 0, 1), name_plan("b"), name_plan("c", 1)]
    results = studies.trials.run_plans(plans, tmp_path, jobs=1, desc="", expected=0)
    assert results == [[["a0x", "a0y"], [], ["a2"]], [], [["c0"]]]
    assert order == ["a0x", "a0y", "a2", "c0"]
    with pytest.raises(UserError, match="Several trials are named e0: a setting has the same value twice"):
        studies.trials.run_plans([name_plan("e", 1), name_plan("e", 1)], tmp_path, jobs=1, desc="", expected=0)


def test_a_trial_in_this_process_uses_one_thread(monkeypatch, tmp_path):
    torch.set_num_threads(2)
    monkeypatch.setattr(studies.trials, "run_trial", lambda trial, *_: {"trial": {"name": torch.get_num_threads()}})
    records = studies.trials.run_plans([name_plan("a", 1)], tmp_path, jobs=1, desc="", expected=0)
    assert records == [[[1]]] and torch.get_num_threads() == 2


def test_one_process_reports_each_trial_as_soon_as_it_has_run(monkeypatch, tmp_path, capsys):
    def run(trial, *args):
        assert capsys.readouterr().err.count("failed: UserError") == int(trial.name[-1] == "y")
        return {"trial": {"name": trial.name}, "error": "UserError: disk"}

    monkeypatch.setattr(studies.trials, "run_trial", run)
    studies.trials.run_plans([name_plan("a", 2)], tmp_path, jobs=1, desc="", expected=0)


def test_a_toy_study_runs_end_to_end_and_reuses_its_records(tmp_path, capsys, monkeypatch):
    args = dict(methods=("aligner1", "lora"), tasks=("facts",), learning_rates=(1e-2,), seeds=(1,), steps=1,
                questions=2, jobs=1, out_dir=tmp_path / "study")  # fmt: skip
    study.main(study.Settings(**args))
    table = (tmp_path / "study" / "table.md").read_text()
    assert capsys.readouterr().out == table
    lines = {line.split(" | ")[0]: line for line in table.splitlines()[:5]}
    assert lines["| LoRA, r = 8"].count("|") == 5 and "| 49,152 |" in lines["| LoRA, r = 8"]
    assert "| 240 |" in lines["| Aligner, N = 1"]
    rows = list(csv.DictReader((tmp_path / "study" / "results.csv").open()))
    assert len(rows) == 1 + 2 + 2 and not any(row["error"] for row in rows)
    assert all((tmp_path / "study" / name).stat().st_size > 10_000 for name in ("accuracy.png", "curves.png"))

    # the second run trains nothing and reports the same results
    monkeypatch.setattr(studies.trials, "prepare_run", lambda *given: (None, prepare_run(*given)[1]))
    study.main(study.Settings(**args, report_dir=tmp_path / "report"))
    assert (tmp_path / "report" / "results.csv").read_text() == (tmp_path / "study" / "results.csv").read_text()
