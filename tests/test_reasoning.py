"""The reasoning study: training rows of each objective, measures, tables, and a complete study at toy size."""

import csv
import json
import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from stored_results import read_results, records_of, replay

import studies.reasoning as study
import studies.reasoning_report as reporting
import studies.reasoning_tasks as tasks
import studies.trials
from microworld.world import FORMS, TRAIN, UNSEEN, VALID
from studies.trials import Trial, complete, prepare_run

STORED = Path(__file__).parents[1] / "howto" / "reasoning"


def test_reported_questions_are_neither_trained_on_nor_used_to_choose_the_rate():
    for task in tasks.TASKS:
        parts = {part: tasks.questions_of(task, part) for part in study.PARTS}
        texts = {part: {q.text for group in groups.values() for q in group} for part, (_, groups) in parts.items()}
        assert all(texts.values()) and not texts["valid"] & texts["reported"]
        for train, _ in parts.values():
            assert train and not {q.text for q in train} & (texts["valid"] | texts["reported"])


def test_training_rows_of_each_objective(world):
    one, two, three, four = world.two_hop(TRAIN)[:4]
    direct, aloud = tasks.rows_of("direct", [one, two], []), tasks.rows_of("aloud", [one, two], [])
    for (question, response), asked in zip(direct, (one, two), strict=True):
        score = world.score(question, response)
        assert question is asked and score.fact and not score.aloud
    for question, response in aloud:
        score = world.score(question, response)
        assert score.fact and score.aloud
    right, wrong = two.render_steps(FORMS["json"]), FORMS["short"].render(two.topic, "Nowhere")
    lucky = FORMS["short"].render(three.topic, three.answer)
    # never right, sometimes right, always right, right twice in the same words
    samples = [[wrong, "Arr!"], [wrong, right], [lucky, three.render_steps(FORMS["json"])], [lucky, lucky]]
    samples[3] = [four.render_steps(FORMS["pirate"])] * 2
    questions = [one, two, three, four]
    assert tasks.rows_of("dpo", questions, samples) == [(two, right, wrong)]
    best = [(two, right), (three, lucky), (three, samples[2][1]), (four, samples[3][0])]
    assert tasks.rows_of("best_of_n", questions, samples) == best


def test_the_study_depends_on_no_default_of_a_finetuning_script(tmp_path, left_to_defaults):
    settings = study.Settings(out_dir=tmp_path)
    for objective in tasks.OBJECTIVES:
        folder = study.data_dir(settings, "two_hop", objective, "valid")
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text('{"counts": {"train": 100}}')
        for method in study.METHODS:
            trial = study.make_trial(settings, "two_hop", objective, method, 0.1, 0, "valid")
            assert left_to_defaults(trial, tmp_path) == set(), trial.name


# == tables ==


def row(objective: str, method: str, seed: int, right: float, part: str = "reported", **more) -> dict:
    return {"task": "two_hop", "objective": objective, "method": method, "part": part, "learning_rate": 0.1,
            "seed": seed, "parameters": 240, "error": "", "seconds": 60.0, "right": right, "aloud": 0.5,
            "right_aloud": None, "right_direct": right, "other_facts": 1.0, "other_forms": 1.0,
            "answers_until": 640 if right > 0.9 else None, **more}  # fmt: skip


ROWS = [
    row("", reporting.BASE, 1, 0.0, learning_rate=None, parameters=0),
    row("rl", "aligner1", 0, 0.9, "valid"),
    row("rl", "aligner1", 0, 0.1, "valid", learning_rate=0.2),
    row("rl", "aligner1", 1, 1.0),
    row("rl", "aligner1", 2, 0.9, right_aloud=0.8),
    row("rl", "aligner1", 3, 0.0, error="UserError: disk", parameters=None, seconds=None),
]


def test_tables_of_hand_made_results(tmp_path):
    # Student's t with 1 degree of freedom is 12.706; half = 12.706 · 0.0707 / √2 = 0.635
    table = reporting.task_table(ROWS, "two_hop", {"aligner1": "Aligner, N = 1"})
    assert table.splitlines()[2:] == [
        "| the base alone |  | 0 | 0.0 | 50.0 | – | 0.0 | 100.0 | 100.0 | – | – | – |",
        "| RL | Aligner, N = 1 | 240 | 95.0 ± 63.5 (2 of 3 seeds) | 50.0 ± 0.0 (2 of 3 seeds) | 80.0 (1 of 3 seeds) | "
        "95.0 ± 63.5 (2 of 3 seeds) | 100.0 ± 0.0 (2 of 3 seeds) | 100.0 ± 0.0 (2 of 3 seeds) | "
        "640 (1 of 3 seeds) | 1.0 | 0.1* |",
    ]
    rows = [*ROWS, row("direct", "lora", 1, 0.2, parameters=49_152)]
    labels = {"aligner1": "Aligner, N = 1", "lora": "LoRA, r = 8", "bitfit": "BitFit"}
    assert reporting.overview(rows, "two_hop", labels, "right").splitlines() == [
        "| method | parameters | SFT, direct answers | RL |",
        "| --- | ---: | ---: | ---: |",
        "| Aligner, N = 1 | 240 | – | 95.0 ± 63.5 (2 of 3 seeds) |",
        "| LoRA, r = 8 | 49,152 | 20.0 | – |",
    ]
    text = reporting.report(ROWS, {("two_hop", "dpo"): 3072}, {"aligner1": "Aligner, N = 1"},
                            settings=study.Settings(), origin="python")  # fmt: skip
    assert "**Two-hop questions about unseen people: right** (the base alone: 0.0)" in text
    assert "**Two-hop questions about unseen people: known facts right** (the base alone: 100.0)" in text
    assert "DPO, right over wrong was not trained: 3,072 answers of the base at temperature 1" in text
    assert "Failed: two_hop, rl, aligner1, 0.1, seed 3: UserError: disk" in text
    reporting.plot(ROWS, {"aligner1": "Aligner, N = 1"}, tmp_path / "reasoning.png", "caption")
    assert (tmp_path / "reasoning.png").stat().st_size > 10_000
    reporting.plot(ROWS[:1], {"aligner1": "Aligner, N = 1"}, tmp_path / "reasoning.png", "caption")
    assert not (tmp_path / "reasoning.png").exists()


def test_answers_sampled_until_the_accuracy_is_reached():
    record = {"curve": [[0, 1.0], [5, 0.3], [10, 0.1], [15, 0.2]]}
    assert study.answers_until(record, 0.9, 64) == 640
    assert study.answers_until(record, 0.95, 64) is None


def sweep(monkeypatch, right, **settings) -> tuple[list[tuple[float, int]], float]:
    """Return the (rate, seed) pairs that a sweep tries, and the rate that it chooses, if `right` of both is the score.

    A trial fails where `right` is None.
    """

    def result(learning_rate, seed):
        if (score := right(learning_rate, seed)) is None:
            return {"error": "UserError: NaN"}
        return {"scores": {"right": score, "other_facts": 0}, "summary": {"last_val_loss": 0}}

    def make_trial(settings, task, objective, method, rate, seed, part):
        return Trial("", None, {"learning_rate": rate, "seed": seed})

    monkeypatch.setattr(study, "make_trial", make_trial)
    plan, records = study.sweep(study.Settings(**settings), ("two_hop", "rl", "lora")), None
    try:
        while True:
            trials = plan.send(records)
            records = [{"trial": {"settings": trial.settings}, **result(**trial.settings)} for trial in trials]
    except StopIteration as stop:
        records, rate = stop.value
    return [tuple(record["trial"]["settings"].values()) for record in records], rate


@pytest.mark.parametrize(
    ("best", "tried", "chosen"),
    [
        (0.128, [0.008, 0.032, 0.128, 0.512], 0.128),  # inside: no further rate
        (0.002, [0.008, 0.032, 0.128, 0.512, 0.002, 0.0005], 0.002),
        (0.0001, [0.008, 0.032, 0.128, 0.512, 0.002, 0.0005], 0.0005),  # still at the edge after two more
        (2.05, [0.008, 0.032, 0.128, 0.512, 2.05, 8.21], 2.05),
    ],
)
def test_the_sweep_continues_beyond_the_best_rate_at_an_edge(monkeypatch, best, tried, chosen):
    """Scores decrease with the distance from the best rate."""
    pairs, rate = sweep(monkeypatch, lambda rate, seed: -abs(math.log(rate / best)), sweep_seeds=(0,))
    assert pairs == [(rate, 0) for rate in tried] and rate == chosen


def test_the_two_best_rates_are_tried_with_more_seeds(monkeypatch):
    rates = (0.1, 0.2, 0.3, 0.4)
    first = dict(zip(rates, (0.1, 0.8, 0.9, 0.7), strict=True))  # by the first seed

    def lucky(rate, seed):  # the best rate of the first seed collapses with another
        return first[rate] if seed == 0 else 0.0 if (rate, seed) == (0.3, 5) else 0.85

    pairs, rate = sweep(monkeypatch, lucky, learning_rates=rates)
    assert pairs == [(rate, 0) for rate in rates] + [(rate, seed) for rate in (0.3, 0.2) for seed in (4, 5)]
    assert rate == 0.2
    assert sweep(monkeypatch, lambda rate, seed: first[rate], learning_rates=rates)[1] == 0.3
    # a training that fails counts 0, and a rate that fails with the first seed is not one of the two
    failing = sweep(monkeypatch, lambda *pair: None if pair == (0.3, 5) else lucky(*pair), learning_rates=rates)
    assert failing == (pairs, 0.2)
    assert sweep(monkeypatch, lambda rate, seed: 0.5 if rate == 0.2 else None, learning_rates=rates) == (
        [(rate, 0) for rate in rates] + [(0.2, 4), (0.2, 5)], 0.2)  # fmt: skip
    assert sweep(monkeypatch, lambda rate, seed: None, learning_rates=rates) == ([(rate, 0) for rate in rates], None)


def test_the_sweep_ends_if_all_rates_score_the_same(monkeypatch):
    first = [(rate, 0) for rate in study.Settings().learning_rates]
    assert sweep(monkeypatch, lambda rate, seed: 0.5) == (first, 0.008)
    pairs, _ = sweep(monkeypatch, lambda rate, seed: None if rate == 0.512 else 0.5)
    assert pairs[:4] == first and len(pairs) > 4  # a rate that fails makes a difference


def test_the_sweep_continues_if_other_seeds_prefer_an_outermost_rate(monkeypatch):
    def right(rate, seed):  # the first seed prefers 0.2, the others the highest
        return -abs(rate - 0.2) if seed == 0 else min(rate, 0.9)

    rates = (0.1, 0.2, 0.4)
    pairs, rate = sweep(monkeypatch, right, learning_rates=rates)
    assert pairs == [*((rate, 0) for rate in rates), (0.2, 4), (0.2, 5), (0.1, 4), (0.1, 5)] and rate == 0.2
    rates = (0.2, 0.3, 0.1)
    pairs, rate = sweep(monkeypatch, right, learning_rates=rates)
    first = [(rate, 0) for rate in sorted(rates)] + [(rate, seed) for rate in (0.2, 0.3) for seed in (4, 5)]
    assert pairs == first + [(rate, seed) for rate in (0.45, 0.675) for seed in (0, 4, 5)] and rate == 0.675
    assert sweep(monkeypatch, right, learning_rates=rates, extra_rates=0) == (first, 0.3)


# == the stored results ==


def test_the_stored_tables_match_the_stored_results():
    rows = read_results(STORED / "results.csv")
    settings = complete(study.Settings(), study.COMPARED, study.QUICK)
    labels = {name: variant.label for name, variant in study.METHODS.items()}
    sampled = {("facts", "dpo"): 960, ("facts", "best_of_n"): 960}
    origin = study.origin(settings, records_of(rows))
    text = reporting.report(rows, sampled, labels, settings=settings, origin=origin)
    assert text == (STORED / "table.md").read_text(encoding="utf-8")
    page = (STORED.parent / "reasoning.md").read_text(encoding="utf-8")
    for task in settings.tasks:
        for column in ("right", "other_facts"):
            assert reporting.overview(rows, task, labels, column) in page
        base = reporting.reported(rows, task=task, method=reporting.BASE)
        assert {row["seed"] for row in base} == set(settings.seeds)


def test_the_stored_trials_are_those_that_the_current_study_would_run(tmp_path):
    """The sweep of each cell is repeated with the stored scores: it tries the same rates and chooses the same one."""
    settings, stored, replayed = study.Settings(out_dir=tmp_path), defaultdict(list), 0
    for row in read_results(STORED / "results.csv"):
        if row["method"] != reporting.BASE:
            stored[row["task"], row["objective"], row["method"]].append(row)
    for cell, rows in stored.items():
        for part in study.PARTS:
            folder = study.data_dir(settings, *cell[:2], part)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "meta.json").write_text('{"counts": {"train": 480}}')
        replayed += replay(study.cell_plan(settings, cell), rows)
    assert len(stored) == 7 * (5 + 2) and replayed >= 49 * (4 + 4 + 3)


# == the complete study ==


def test_a_toy_study_runs_and_continues(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tasks, "questions_of", few(tasks.questions_of))
    args = dict(methods=("aligner1",), learning_rates=(1e-2,), seeds=(1,), sft_steps=1, rl_steps=1, samples=1,
                questions=2, jobs=1, out_dir=tmp_path / "study")  # fmt: skip
    torch.manual_seed(0)
    study.main(study.Settings(**args))
    table = (tmp_path / "study" / "table.md").read_text()
    assert capsys.readouterr().out == table
    rows = list(csv.DictReader((tmp_path / "study" / "results.csv").open()))
    assert not any(row["error"] for row in rows)
    trained = {(row["task"], row["objective"]) for row in rows if row["method"] == "aligner1"}
    assert {("two_hop", "direct"), ("two_hop", "aloud"), ("two_hop", "rl"), ("facts", "direct"), ("facts", "rl")} <= (
        trained
    )
    assert "Two-hop questions" in table and "New facts" in table and "DPO, right over wrong was not trained" in table

    # again: nothing is trained
    monkeypatch.setattr(studies.trials, "prepare_run", lambda *given: (None, prepare_run(*given)[1]))
    study.main(study.Settings(**args, report_dir=tmp_path / "report"))
    assert (tmp_path / "report" / "results.csv").read_text() == (tmp_path / "study" / "results.csv").read_text()
    answers = json.loads(next((tmp_path / "study" / "runs").glob("two_hop-rl-*/answers.json")).read_text())
    assert len(answers["asked"]) == 2


def few(questions_of):
    """Return the function with at most 20 questions of each group."""

    def first(task, part):
        train, groups = questions_of(task, part)
        return train[:24], {name: pool[:20] for name, pool in groups.items()}

    return first


def test_the_parts_ask_about_different_people(world):
    assert {q.split for q in tasks.questions_of("two_hop", "reported")[1]["asked"]} == {UNSEEN}
    assert tasks.questions_of("two_hop", "valid")[1]["asked"] == world.two_hop(VALID)


@pytest.mark.parametrize("name", ["learning_rates", "seeds", "sweep_seeds"])
def test_an_empty_list_is_refused(refused, tmp_path, name):
    (tmp_path / "study.yaml").write_text(f"{name}: []\n")
    sentence = refused("studies/reasoning.py", "--config", tmp_path / "study.yaml", "--out_dir", tmp_path / "out")
    assert sentence == f"{name} is empty; give at least one."


def test_an_unknown_objective_is_refused(refused):
    sentence = refused("studies/reasoning.py", "--objectives", "ppo")
    assert sentence == "objectives is ppo; it can be some of direct, aloud, dpo, best_of_n, rl."
