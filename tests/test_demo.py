"""The demo's tables, figures and report, and the table of the adapter study, from made-up scores."""

from pathlib import Path

from scripts import demo
from studies import train_microworld_adapters


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
