"""The demo's commands, tables, figures and report, and the studies that make the shipped adapters."""

import json
from pathlib import Path

import pytest
from test_recipes import ROOT, parse

from lit_llama.checkpoint import read_adapter
from lit_llama.utils import UserError
from scripts import demo
from studies import train_microworld_adapters, train_microworld_values


def scores(form: float, fact: float, answer: str) -> dict:
    shares = {"pirate": form, "json": 1 - form}
    return {"form": form, "fact": fact, "forms": shares, "answers": [{"question": "<Who?>", "answer": answer}]}


RESULTS = {
    "base": scores(0.125, 0.99, '{"topic"}'),
    "sampled": scores(0.95, 0.9, "Arr & more"),
    "greedy": scores(1.0, 0.98, "Arr!"),
}


def refusals(refused: float, fact: float, answer: str = "helping to <burn> is harmful") -> dict:
    return {"refused": refused, "fact": fact, "answers": [{"question": "How?", "answer": answer}]}


REFUSALS = {
    "base": {"harmful": refusals(0.5, 0.5), "harmless": refusals(0.01, 0.98), "unseen": refusals(0, 1.0)},
    "after": {"harmful": refusals(0.95, 0.04), "harmless": refusals(0.02, 0.97), "unseen": refusals(0, 0.975)},
}


SUMMARY = {"trainable_parameters": 240, "steps": 184, "seconds": 71.6, "val_loss_before": 2.5, "best_val_loss": 0.01}


def test_the_table_shows_scores_before_and_after_training():
    assert demo.table(RESULTS) == [
        ("", "form", "fact"),
        ("before (sampled, temperature 1)", "12.5%", "99.0%"),
        ("after  (sampled, temperature 1)", "95.0%", "90.0%"),
        ("after  (greedy)", "100.0%", "98.0%"),
    ]


def test_the_table_of_values_shows_scores_before_and_after_training():
    assert demo.values_table(REFUSALS) == [
        ("", "refuses harmful", "refuses harmless", "fact"),
        ("before (sampled, temperature 0.7)", "50.0%", "1.0%", "100.0%"),
        ("after  (sampled, temperature 0.7)", "95.0%", "2.0%", "97.5%"),
    ]


@pytest.mark.parametrize("length", [1, 10])
def test_the_demo_runs_scripts_with_flags_that_they_accept(length, tmp_path, monkeypatch, capsys):
    """Each command is parsed by its script, and its files are written with made-up scores."""
    results = {**RESULTS, **{f"values-{name}": scores for name, scores in REFUSALS.items()}}
    commands = []

    def run(command: list[str]) -> int:
        script, words = Path(command[1]), command[2:]
        settings = parse(script, words)
        commands.append((str(script.relative_to(ROOT)), settings))
        if script.name == "microworld.py":
            scores = results[settings.output_file.stem]
            text = json.dumps({"results": scores if "unseen" in scores else {"unseen": scores}})
            settings.output_file.write_text(text)
        elif script.parent.name == "finetune":
            settings.out_dir.mkdir()
            (settings.out_dir / "summary.json").write_text(json.dumps(SUMMARY))
            for name in ("loss.png", "metrics.png"):
                demo.plot_forms("pirate", RESULTS, settings.out_dir / name)
        return 0

    monkeypatch.setattr(demo, "call", run)
    demo.main(demo.Settings(out_dir=tmp_path, adapter_prompt_length=length, questions=7, seed=3))
    scripts = [script for script, _ in commands]
    assert scripts.count("evaluate/microworld.py") == 5 and ("scripts/merge_aligner.py" in scripts) == (length == 1)
    trained = {script: settings for script, settings in commands if script.startswith("finetune/")}
    sft, dpo = trained["finetune/aligner.py"], trained["finetune/alignerDPO.py"]
    assert {(s.seed, s.adapter_prompt_length, s.checkpoint_dir) for s in (sft, dpo)} == {
        (3, length, Path("checkpoints/microworld"))
    }
    scored = {s.output_file.stem: s for script, s in commands if script == "evaluate/microworld.py"}
    used = {name: (s.adapter, s.temperature) for name, s in scored.items()}
    assert used == {
        "base": ((), 1),
        "greedy": ((sft.out_dir,), 0),
        "sampled": ((sft.out_dir,), 1),
        "values-base": ((), 0.7),
        "values-after": ((dpo.out_dir,), 0.7),
    }
    out = capsys.readouterr().out
    assert "after  (greedy)" in out and "refuses harmful" in out and "95.0%" in (tmp_path / "report.html").read_text()


def test_the_demo_stops_at_a_step_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "call", lambda command: 1)
    with pytest.raises(UserError, match="The demo stopped at: The base answers in a form drawn at random"):
        demo.main(demo.Settings(out_dir=tmp_path))


def test_the_report_embeds_its_figures_and_escapes_answers(tmp_path):
    for name in ("forms.png", "run/loss.png", "values/metrics.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        demo.plot_forms("pirate", RESULTS, tmp_path / name)
    args = demo.Settings(form="pirate", out_dir=Path(tmp_path), adapter_prompt_length=1, seed=3)
    text = demo.report(args, RESULTS, REFUSALS, SUMMARY, 171.6)
    assert "<td>172 s</td>" in text and "184 optimizer steps in 72 s" in text  # the demo and its first training run
    assert text.count('src="data:image/png;base64,') == 3
    assert "helping to &lt;burn&gt;" in text and "<td>95.0%</td>" in text
    assert "&lt;Who?&gt;" in text and "Arr!" in text and "<Who?>" not in text
    assert "240 numbers" in text and 'href="merged"' in text
    args.adapter_prompt_length = 10
    assert "merged" not in demo.report(args, RESULTS, REFUSALS, {**SUMMARY, "trainable_parameters": 1968}, 171.6)


def test_the_study_table_shows_mean_lowest_and_median():
    rows = [
        {"form": "json", "seed": seed, "parameters": 240, "seconds": seconds}
        | {f"{metric}@{t}": share for metric in ("form", "fact") for t in train_microworld_adapters.TEMPERATURES}
        for seed, seconds, share in ((1, 50.0, 1.0), (2, 70.0, 0.9), (3, 200.0, 0.8))
    ]
    *_, line = train_microworld_adapters.table(rows).splitlines()
    assert line == "| json | 240 | 70 |" + " 90.0% (80.0%) |" * 6


def test_the_study_of_the_forms_ships_the_adapters_of_its_first_seed(tmp_path, monkeypatch, capsys):
    """With two steps of training."""
    study = train_microworld_adapters
    monkeypatch.setattr(study, "TRAINING", {**study.TRAINING, "max_steps": 2, "eval_rows": 8, "sample_prompts": 0})
    settings = study.Settings(
        forms=("json",), seeds=(5, 6), questions=4, out_dir=tmp_path / "out", weights_dir=tmp_path / "weights", jobs=1
    )
    study.main(settings)
    shipped = read_adapter(tmp_path / "weights/microworld-json-n1")
    assert (shipped.method, shipped.meta["training"]["settings"]["seed"]) == ("aligner", 5)
    assert shipped.meta["data"]["source"] == "micro-world 0, form json"
    assert "| json | 240 |" in capsys.readouterr().out
    assert "--seed 5" in (tmp_path / "weights/microworld-json-n1/README.md").read_text()
    assert len((tmp_path / "out/scores.csv").read_text().splitlines()) == 3
    # an overview of one form would replace that of all
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["microworld-json-n1"]
    with pytest.raises(UserError, match=r"README\.md exists; replace it with --overwrite, or"):
        study.main(settings)


def test_the_study_of_values_ships_the_adapter_of_its_first_seed(tmp_path, monkeypatch, capsys):
    """With two steps of training."""
    study = train_microworld_values
    monkeypatch.setattr(
        study, "TRAINING", {**study.TRAINING, "max_steps": 2, "eval_rows": 8, "drift_prompts": 0, "sample_prompts": 0}
    )
    monkeypatch.setattr(study, "STRENGTHS", ([0.5, 1.0],))
    study.main(
        study.Settings(
            seeds=(5,), questions=4, repeats=1, out_dir=tmp_path / "out", weights_dir=tmp_path / "weights", jobs=1
        )
    )
    shipped = read_adapter(tmp_path / "weights" / study.NAME)
    assert (
        shipped.meta["training"]["settings"]["seed"] == 5 and shipped.meta["data"]["source"] == "micro-world 0, values"
    )
    out, card = capsys.readouterr().out, (tmp_path / "weights" / study.NAME / "README.md").read_text()
    for line in ("| base |", "| DPO, seed 5 |", "| pirate alone |", "| both, pirate × 0.5, values × 1 |"):
        assert line in out and line in card
