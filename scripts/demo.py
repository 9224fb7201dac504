"""Finetune the bundled model end to end, to a form by SFT and to values by DPO: prepare, train, compare, report.

    python3 scripts/run.py demo

It runs the scripts that you would run by hand, prints each command, and writes out/demo/report.html.
"""

import base64
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.settings import Checked, PositiveInt, Seed, as_flags
from microworld.world import FormName


@dataclass
class Settings(Checked):
    form: FormName = "pirate"  # form to learn; the base knows all but telegram
    out_dir: Path = Path("out/demo")  # folder for all files of the demo
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder
    adapter_prompt_length: PositiveInt = 1  # prefix tokens
    questions: PositiveInt = 300  # maximum number of questions per group, before and after
    seed: Seed = 1337  # seed of the adapter and of the data order


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lit_llama.checkpoint import versions
from lit_llama.console import call
from lit_llama.run.report import legend_above, make_figure, save_figure
from lit_llama.storage.files import claim, write_text
from lit_llama.utils import UserError

ROOT = Path(__file__).parent.parent
GROUPS = ("harmful", "harmless", "unseen")
Scores = dict[str, dict]  # by name


def step(title: str, script: str, **flags: object) -> None:
    """Print the command of a script of this repository and run it.

    Raises:
        UserError: The script failed and has printed the reason.
    """
    arguments = as_flags(flags)
    print(f"\n== {title}\n$ python {script} {' '.join(arguments)}", flush=True)
    if call([sys.executable, str(ROOT / script), *arguments]):
        raise UserError(f"The demo stopped at: {title}.")


def score(settings: Settings, title: str, name: str, **flags: object) -> None:
    """Score a model on the micro-world and write NAME.json."""
    step(title, "evaluate/microworld.py", checkpoint_dir=settings.checkpoint_dir, questions=settings.questions, **flags,
         output_file=settings.out_dir / f"{name}.json", overwrite=True)  # fmt: skip


def read_scores(settings: Settings, name: str) -> Scores:
    return json.loads((settings.out_dir / f"{name}.json").read_text())["results"]


def teach_form(settings: Settings) -> Scores:
    """Finetune to a form, and return the scores on unseen entities: "base" before, "greedy" and "sampled" after."""
    data, run, form = settings.out_dir / f"data-{settings.form}", settings.out_dir / "run", settings.form
    base = {"checkpoint_dir": settings.checkpoint_dir}
    score(settings, "The base answers in a form drawn at random", "base", form=form, temperature=1)
    step("Prepare: questions about half of the entities, answered in one form", "scripts/prepare_microworld.py",
         **base, form=form, output_dir=data)  # fmt: skip
    step("Finetune: the base is frozen, only the Aligner learns", "finetune/aligner.py", **base, data_dir=data,
         out_dir=run, adapter_prompt_length=settings.adapter_prompt_length, seed=settings.seed,
         overwrite=True)  # fmt: skip
    step("Before and after", "generate/aligner.py", **base, adapter=run, compare_base=True)
    score(settings, "Greedy answers of the aligned model", "greedy", form=form, adapter=run)
    score(settings, "The same, sampled at temperature 1", "sampled", form=form, adapter=run, temperature=1)
    if settings.adapter_prompt_length == 1:
        step("Merge the token into a plain LLaMA, for transformers and others", "scripts/merge_aligner.py", **base,
             adapter=run, output_dir=settings.out_dir / "merged")  # fmt: skip
    return {name: read_scores(settings, name)["unseen"] for name in ("base", "greedy", "sampled")}


def teach_values(settings: Settings) -> Scores:
    """Teach values by DPO, and return the scores of all groups: "base" and "after"."""
    pairs, run = settings.out_dir / "data-values", settings.out_dir / "values"
    base, options = {"checkpoint_dir": settings.checkpoint_dir}, {"groups": GROUPS, "temperature": 0.7}
    score(settings, "Values: the base refuses half of what is harmful", "values-base", **options)
    step("Prepare: pairs of a better and a worse answer", "scripts/prepare_microworld_safe.py", **base,
         output_dir=pairs)  # fmt: skip
    step("DPO: a separate adapter on the same base", "finetune/alignerDPO.py", **base, data_dir=pairs, out_dir=run,
         adapter_prompt_length=settings.adapter_prompt_length, seed=settings.seed, overwrite=True)  # fmt: skip
    score(settings, "Requests with verbs and objects that training never saw", "values-after", **options, adapter=run)
    return {name: read_scores(settings, f"values-{name}") for name in ("base", "after")}


def main(settings: Settings) -> None:
    names = ("base", "greedy", "sampled", "values-base", "values-after")
    claim(settings.out_dir, ("report.html", "forms.png", *(f"{name}.json" for name in names)))
    began = time.perf_counter()
    results, refusals = teach_form(settings), teach_values(settings)
    seconds = time.perf_counter() - began
    summary = json.loads((settings.out_dir / "run" / "summary.json").read_text())
    plot_forms(settings.form, results, settings.out_dir / "forms.png")
    write_text(settings.out_dir / "report.html", report(settings, results, refusals, summary, seconds))
    print(f"\n== Result: {summary['trainable_parameters']} trained parameters, form {settings.form}, held-out entities")
    for line in table(results):
        print("{:<34}{:>10}{:>10}".format(*line))
    print(
        f"\n== Result: {summary['trainable_parameters']} trained parameters, values, held-out verbs, objects, entities"
    )
    for line in values_table(refusals):
        print("{:<34}{:>17}{:>18}{:>10}".format(*line))
    print(f"\n{seconds:.0f} s in total. Open {settings.out_dir / 'report.html'}")


def table(results: Scores) -> list[tuple[str, str, str]]:
    """Return table rows (label, form accuracy, fact accuracy), the heading first."""
    titles = {"base": "before (sampled, temperature 1)", "sampled": "after  (sampled, temperature 1)",
              "greedy": "after  (greedy)"}  # fmt: skip
    rows = [(title, f"{results[k]['form']:.1%}", f"{results[k]['fact']:.1%}") for k, title in titles.items()]
    return [("", "form", "fact"), *rows]


def values_table(refusals: Scores) -> list[tuple[str, str, str, str]]:
    """Return table rows (label, refused harmful and harmless requests, fact accuracy), the heading first."""
    titles = {"base": "before (sampled, temperature 0.7)", "after": "after  (sampled, temperature 0.7)"}
    shares = {
        name: (groups["harmful"]["refused"], groups["harmless"]["refused"], groups["unseen"]["fact"])
        for name, groups in refusals.items()
    }
    rows = [(title, *(f"{share:.1%}" for share in shares[name])) for name, title in titles.items()]
    return [("", "refuses harmful", "refuses harmless", "fact"), *rows]


def plot_forms(form: str, results: Scores, image: Path) -> None:
    """Plot the shares of all forms before and after."""
    names = sorted({name for r in results.values() for name in r["forms"]}, key=lambda n: (n == "none", n != form, n))
    figure = make_figure(7, 3.4)
    figure.suptitle("Forms of sampled answers, temperature 1")
    axes = figure.subplots()
    for i, (key, label) in enumerate({"base": "before", "sampled": "after"}.items()):
        shares = [results[key]["forms"].get(name, 0) for name in names]
        axes.bar([x + 0.4 * i - 0.2 for x in range(len(names))], shares, 0.4, label=label)
    axes.set_xticks(range(len(names)), [f"{n}\n(target)" if n == form else n for n in names])
    axes.set(ylabel="share of answers", ylim=(0, 1))
    legend_above(axes)
    save_figure(figure, image)


def report(settings: Settings, results: Scores, refusals: Scores, summary: dict, seconds: float) -> str:
    """Return the report as one HTML file, from scripts/demo_report.html.jinja.

    Args:
        results, refusals: The scores that `teach_form` and `teach_values` return.
        summary: The summary of the run that learned the form.
        seconds: The duration of the demo, including training.
    """

    def examples(before: dict, after: dict, count: int) -> list[tuple[str, str, str]]:
        pairs = zip(before["answers"][:count], after["answers"][:count], strict=True)
        return [(b["question"], b["answer"], a["answer"]) for b, a in pairs]

    out = settings.out_dir
    images = {"forms": out / "forms.png", "loss": out / "run/loss.png", "metrics": out / "values/metrics.png"}
    made_by = {"command": shlex.join(["python", *sys.argv]), "seed": settings.seed, "took": f"{seconds:.0f} s"}
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return templates.get_template("demo_report.html.jinja").render(
        form=settings.form,
        summary=summary,
        forms=table(results),
        values=values_table(refusals),
        form_examples=examples(results["base"], results["greedy"], 8),
        value_examples=[
            example
            for kind in ("harmful", "harmless")
            for example in examples(refusals["base"][kind], refusals["after"][kind], 4)
        ],
        pictures={name: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
                  for name, path in images.items()},
        merged=settings.adapter_prompt_length == 1,
        made_by={**made_by, **versions()},
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main, settings)
