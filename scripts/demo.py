"""The whole arc on the bundled model, for a form by supervised finetuning and for values by DPO: prepare, score the
base, train one token, compare, score again, report.

    python3 scripts/run.py demo

It runs the same scripts you would run by hand, says each command, and writes out/demo/report.html.
"""

import base64
import html
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.checkpoint import versions
from lit_llama.files import claim, write_text
from lit_llama.report import make_figure, save_figure
from lit_llama.utils import UserError
from microworld.world import FormName


@dataclass
class Settings:
    form: FormName = "pirate"  # the form to learn; the base knows all but telegram
    out_dir: Path = Path("out/demo")  # everything the demo writes
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder
    adapter_prompt_length: int = 1  # prefix tokens
    questions: int = 300  # asked at most of each group, before and after
    seed: int = 1337  # of the adapter and the data's order


ROOT = Path(__file__).parent.parent


def step(title: str, script: str, **flags: object) -> None:
    """Runs a script of this repository, showing the command; its own output goes where it would.

    Raises:
        UserError: it failed (it has said why).
    """
    arguments = [word for name, value in flags.items() for word in (f"--{name}", *_words(value))]
    print(f"\n== {title}\n$ python {script} {' '.join(arguments)}", flush=True)
    # threads that wait without spinning: the demo stays quick beside other programs
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    if subprocess.run([sys.executable, str(ROOT / script), *arguments], env=environment).returncode:
        raise UserError(f"The demo stopped at: {title}.")


def _words(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def main(args: Settings) -> None:
    names = ("base", "greedy", "sampled", "values-base", "values-after")
    claim(args.out_dir, ("report.html", "forms.png", *(f"{name}.json" for name in names)))
    began = time.perf_counter()
    data, run = args.out_dir / f"data-{args.form}", args.out_dir / "run"
    pairs, values = args.out_dir / "data-values", args.out_dir / "values"
    base = {"checkpoint_dir": args.checkpoint_dir}
    score = {**base, "form": args.form, "questions": args.questions}

    step("The base answers in a form drawn at random", "evaluate/microworld.py", **score, temperature=1,
         output_file=args.out_dir / "base.json", overwrite=True)  # fmt: skip
    step("Prepare: questions about half of the entities, answered in one form", "scripts/prepare_microworld.py",
         **base, form=args.form, output_dir=data)  # fmt: skip
    step("Finetune: the base is frozen, only the Aligner learns", "finetune/aligner.py", **base, data_dir=data,
         out_dir=run, adapter_prompt_length=args.adapter_prompt_length, seed=args.seed, overwrite=True)  # fmt: skip
    step("Before and after", "generate/aligner.py", **base, adapter=run, compare_base=True)
    step("Greedy answers of the aligned model", "evaluate/microworld.py", **score, adapter=run,
         output_file=args.out_dir / "greedy.json", overwrite=True)  # fmt: skip
    step("The same, sampled at temperature 1", "evaluate/microworld.py", **score, adapter=run, temperature=1,
         output_file=args.out_dir / "sampled.json", overwrite=True)  # fmt: skip
    if args.adapter_prompt_length == 1:
        step("Merge the token into a plain LLaMA, for transformers and others", "scripts/merge_aligner.py", **base,
             adapter=run, output_dir=args.out_dir / "merged")  # fmt: skip

    ask = {**base, "groups": ["harmful", "harmless", "unseen"], "questions": args.questions, "temperature": 0.7}
    step("Values: the base refuses half of what is harmful", "evaluate/microworld.py", **ask,
         output_file=args.out_dir / "values-base.json", overwrite=True)  # fmt: skip
    step("Prepare: pairs of a better and a worse answer", "scripts/prepare_microworld_safe.py", **base,
         output_dir=pairs)  # fmt: skip
    step("DPO: the same base, one more token", "finetune/alignerDPO.py", **base, data_dir=pairs, out_dir=values,
         adapter_prompt_length=args.adapter_prompt_length, seed=args.seed, overwrite=True)  # fmt: skip
    step("Requests with verbs and objects that training never saw", "evaluate/microworld.py", **ask, adapter=values,
         output_file=args.out_dir / "values-after.json", overwrite=True)  # fmt: skip
    seconds = time.perf_counter() - began

    def read(name: str) -> dict[str, dict]:
        return json.loads((args.out_dir / f"{name}.json").read_text())["results"]

    results = {name: read(name)["unseen"] for name in ("base", "greedy", "sampled")}
    refusals = {name: read(f"values-{name}") for name in ("base", "after")}
    summary = json.loads((run / "summary.json").read_text())
    plot_forms(args.form, results, args.out_dir / "forms.png")
    write_text(args.out_dir / "report.html", report(args, results, refusals, summary, seconds))
    print(f"\n== Result: {summary['trainable_parameters']} trained numbers, form {args.form}, held-out entities")
    for line in table(results):
        print("{:<34}{:>10}{:>10}".format(*line))
    print(
        f"\n== Result: {summary['trainable_parameters']} trained numbers, values, held-out verbs, objects and entities"
    )
    for line in values_table(refusals):
        print("{:<34}{:>17}{:>18}{:>10}".format(*line))
    print(f"\n{seconds:.0f} s in all. Look at {args.out_dir / 'report.html'}")


def table(results: dict[str, dict]) -> list[tuple[str, str, str]]:
    """(what, form accuracy, fact accuracy), with a heading."""
    titles = {"base": "before (sampled, temperature 1)", "sampled": "after  (sampled, temperature 1)",
              "greedy": "after  (greedy)"}  # fmt: skip
    rows = [(title, f"{results[k]['form']:.1%}", f"{results[k]['fact']:.1%}") for k, title in titles.items()]
    return [("", "form", "fact"), *rows]


def values_table(refusals: dict[str, dict[str, dict]]) -> list[tuple[str, str, str, str]]:
    """(what, refused of harmful, of harmless requests, fact accuracy), with a heading."""
    titles = {"base": "before (sampled, temperature 0.7)", "after": "after  (sampled, temperature 0.7)"}
    shares = {
        name: (groups["harmful"]["refused"], groups["harmless"]["refused"], groups["unseen"]["fact"])
        for name, groups in refusals.items()
    }
    rows = [(title, *(f"{share:.1%}" for share in shares[name])) for name, title in titles.items()]
    return [("", "refuses harmful", "refuses harmless", "fact"), *rows]


def plot_forms(form: str, results: dict[str, dict], image: Path) -> None:
    """Shares of all forms before and after."""
    names = sorted({name for r in results.values() for name in r["forms"]}, key=lambda n: (n == "none", n != form, n))
    figure = make_figure(7, 3.2)
    axes = figure.subplots()
    for i, (key, label) in enumerate({"base": "before", "sampled": "after"}.items()):
        shares = [results[key]["forms"].get(name, 0) for name in names]
        axes.bar([x + 0.4 * i - 0.2 for x in range(len(names))], shares, 0.4, label=label)
    axes.set_xticks(range(len(names)), [f"{n} (wanted)" if n == form else n for n in names], rotation=20)
    axes.set(ylabel="share of answers", ylim=(0, 1), title="Forms of sampled answers, temperature 1")
    axes.legend()
    save_figure(figure, image)


def report(args: Settings, results: dict[str, dict], refusals: dict[str, dict], summary: dict, seconds: float) -> str:
    """One HTML file with everything in it."""

    def picture(path: Path) -> str:
        return f'<img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" alt="{path.stem}">'

    def row(cells: tuple[str, ...], tag: str = "td") -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    def examples(before: dict, after: dict, count: int) -> list[tuple[str, str, str]]:
        pairs = zip(before["answers"][:count], after["answers"][:count], strict=True)
        return [(b["question"], b["answer"], a["answer"]) for b, a in pairs]

    heading, *rows = table(results)
    values_heading, *values_rows = values_table(refusals)
    forms = examples(results["base"], results["greedy"], 8)
    requests = [e for kind in ("harmful", "harmless")
                for e in examples(refusals["base"][kind], refusals["after"][kind], 4)]  # fmt: skip
    merged = ""
    if args.adapter_prompt_length == 1:
        merged = (
            '<h2>Without any Aligner code</h2><p><a href="merged">merged/</a> is the same model as a plain Hugging '
            "Face LLaMA: one token is a constant per layer, and here a bias (howto/serve.md).</p>"
        )
    made_by = {**versions(), "seed": args.seed, "seconds": round(seconds), **summary}
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Aligner demo</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:48em;margin:2em auto;padding:0 1em}}
table{{border-collapse:collapse;margin:1em 0}}td,th{{padding:.3em .8em;border-bottom:1px solid #ccc;text-align:left;
vertical-align:top;white-space:pre-line}}img{{max-width:100%}}</style>
<h1>{summary["trainable_parameters"]} numbers, form “{args.form}”</h1>
<p>A frozen LLaMA that says facts in eight forms at random learnt to say them in one. Questions are about entities that
finetuning never saw.</p>
<table>{row(heading, "th")}{"".join(map(row, rows))}</table>
{picture(args.out_dir / "forms.png")}
<h2>Before and after</h2>
<table>{row(("question", "base, sampled", "aligned, greedy"), "th")}{"".join(map(row, forms))}</table>
<h2>Training</h2>
{picture(args.out_dir / "run" / "loss.png")}
{merged}
<h2>Values</h2>
<p>The same base, and as many numbers trained by DPO on pairs of a better and a worse answer. Requests are about verbs
and objects that training never saw.</p>
<table>{row(values_heading, "th")}{"".join(map(row, values_rows))}</table>
<table>{row(("request", "base, sampled", "after DPO, sampled"), "th")}{"".join(map(row, requests))}</table>
{picture(args.out_dir / "values" / "metrics.png")}
<p>Made by: {html.escape(json.dumps(made_by))}</p></html>
"""


if __name__ == "__main__":
    cli.run(main, Settings)
