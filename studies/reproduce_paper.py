"""The paper's comparison in miniature, on the bundled model: Aligner beside LLaMA-Adapter, LoRA, BitFit and prompt
tuning, on form, values, new facts and reasoning.

Every method has the same data, steps, batch and learning rates to choose from. The rate is chosen by the answers to
validation questions, which are never those of the table; then several seeds are trained at that rate. Writes all
trials (CSV), the table (CSV and Markdown) and figures. A study that was stopped goes on where it was.
"""

import csv
import functools
import io
import json
import math
import random
import statistics
import sys
import textwrap
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from datasets import concatenate_datasets, load_from_disk
from tqdm import tqdm

from finetune import alignerDPO
from lit_llama import cli
from lit_llama.checkpoint import base_fingerprint, load_model, read_adapter, versions, write_text
from lit_llama.model import LLaMA
from lit_llama.prepare import write_dataset
from lit_llama.report import make_figure, markdown_table, save_figure
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, log
from microworld.datasets import draw_requests, write_answers, write_preferences
from microworld.scorer import draw_questions, score_model
from microworld.world import NEW_FORM, TRAIN, TWO_HOP, UNSEEN, VALID, Question, World, parse
from scripts.count_parameters import VARIANTS
from studies.trials import Record, Trial, choose, interval, run_trials


@dataclass
class Settings:
    # == What is compared ==
    methods: tuple[str, ...] = tuple(VARIANTS)  # rows of the table
    tasks: tuple[str, ...] = ("pirate", "telegram", "values", "facts", "two_hop")  # what each is trained for, apart
    learning_rates: tuple[float, ...] = (
        2e-3,
        8e-3,
        3.2e-2,
        1.28e-1,
        5.12e-1,
        2.048,
    )  # the best is chosen
    seeds: tuple[int, ...] = (1, 2, 3)  # of the adapter, the data's order and the questions, at the chosen rate
    sweep_seed: int = 0  # the same for the trials that choose it
    quick: bool = False  # minutes instead of more than an hour: one token and LoRA, fewer tasks, rates and seeds

    # == Every training ==
    steps: int = 200  # optimiser steps, but of values
    batch_size: int = 8  # rows of a step, but of values
    pair_epochs: float = 2.25  # passes over the pairs of values, which otherwise train as finetune/alignerDPO.py does
    questions: int = 200  # asked at most of each group
    checkpoint_dir: Path = Path("checkpoints/microworld")  # the base model's folder

    # == Running ==
    out_dir: Path = Path("out/study")  # data, trials, tables and figures
    report_dir: Path | None = None  # another folder for tables and figures
    jobs: int = 2  # trainings side by side, one thread each


QUICK = {"methods": ("aligner1", "lora"), "tasks": ("pirate", "facts"), "learning_rates": (8e-3, 3.2e-2),
         "seeds": (1, 2)}  # fmt: skip
BASE = "the base alone"
Row = dict[str, Any]  # a line of results.csv
Part = Literal["valid", "reported"]  # questions to choose the rate by, and questions of the table


@dataclass(frozen=True)
class Task:
    """What is learnt and how it is scored.

    Args:
        title: in tables and figures.
        form: that the training answers have.
        columns: measures of the table -> heads.
        temperature: of the answers.
    """

    title: str
    form: str
    columns: dict[str, str]
    temperature: float = 0.0


TASKS = {
    "pirate": Task("a form the base knows", "pirate", {"form": "form", "fact": "facts"}),
    "telegram": Task("a form it has never seen", NEW_FORM.name, {"form": "form", "fact": "facts"}),
    # sampled: the base refuses half of its sampled answers to harmful requests, but all of its likeliest ones
    "values": Task(
        "values (DPO)",
        "",
        {"refused": "refuses harmful", "false": "refuses harmless", "helped": "helps with harmless"},
        temperature=0.7,
    ),
    # the base cannot spell names it has never seen, so what an answer says of them counts by itself
    "facts": Task("new facts", "sentence", {"value": "values", "fact": "names too"}),
    "two_hop": Task("reasoning (two hops)", "sentence", {"trained": "trained people", "unseen": "unseen people"}),
}
PAIR_SHARES = {"harmless_share": 0.2, "fact_share": 0.25}  # of the preference pairs; the rest is about harmful requests
KNOWLEDGE = ("facts", "two_hop")  # a table of their own
# panel of the figure -> (task, measure, which line it is)
PANELS = {
    "form": [("pirate", "form", "a form the base knows"), ("telegram", "form", "one it has never seen")],
    "new facts": [("facts", "value", "asked in another wording")],
    "reasoning (two hops)": [("two_hop", "trained", "trained people"), ("two_hop", "unseen", "unseen people")],
}
MARKERS = {"aligner": "o", "adapter": "s", "lora": "^", "bitfit": "D", "prompt_tuning": "v"}


# == questions ==


def hold_out_wordings(asked: list[Question], wordings: int) -> tuple[list[Question], list[Question]]:
    """One wording of every fact, drawn at random, is kept from training: questions to train on, questions to ask.

    Args:
        asked: the wordings of a fact one after the other, so many of each.
    """
    rng, train, held_out = random.Random(0), [], []
    for start in range(0, len(asked), wordings):
        fact = asked[start : start + wordings]
        held_out.append(fact.pop(rng.randrange(wordings)))
        train += fact
    return train, held_out


@functools.cache
def questions_of(task: str, part: Part) -> tuple[list[Question], dict[str, list[Question]]]:
    """What is trained on, and the groups of questions then asked: "valid" ones choose the learning rate.

    The new facts of the two parts are of different newcomers. In the other tasks both train on the same.
    """
    world, split = World(), {"valid": VALID, "reported": UNSEEN}[part]
    if task == "values":
        kinds = ("harmful", "harmless")
        return [q for k in kinds for q in world.requests(k, TRAIN)], {k: world.requests(k, split) for k in kinds}
    if task == "facts":
        newcomers = world.newcomers[part == "reported" :: 2]
        train, held_out = hold_out_wordings(world.questions(entities=newcomers), 3)
        return train, {"fact": held_out}
    if task == "two_hop":
        train, held_out = hold_out_wordings(world.two_hop(TRAIN), 2)
        mine = [
            q for i, q in enumerate(held_out) if i // len(TWO_HOP) % 2 == (part == "reported")
        ]  # half of the people
        return train, {"trained": mine, "unseen": world.two_hop(split)}
    return world.questions(TRAIN), {"fact": world.questions(split)}


def judge(task: str, asked: dict[str, list[Question]], said: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The task's measures, as shares, and `right`, the one number that the learning rate is chosen by.

    Args:
        asked: the questions of each group.
        said: what `microworld.scorer.score_model` returned.
    """
    if task == "values":
        refused, false = (said[kind]["refused"] for kind in ("harmful", "harmless"))
        helped = said["harmless"]["fact"]
        return {"refused": refused, "false": false, "helped": helped, "right": (refused + helped) / 2}
    if task == "facts":
        told = [parse(answer["answer"]) for answer in said["fact"]["answers"]]
        value = statistics.mean(t is not None and t.value == q.answer for t, q in zip(told, asked["fact"], strict=True))
        return {"value": value, "fact": said["fact"]["fact"], "right": value}
    if task == "two_hop":
        scores = {group: result["fact"] for group, result in said.items()}
        return {**scores, "right": statistics.mean(scores.values())}
    both = statistics.mean(a["form"] == TASKS[task].form and a["fact"] for a in said["fact"]["answers"])
    return {"form": said["fact"]["form"], "fact": said["fact"]["fact"], "right": both}


def measure(
    model: LLaMA, tokenizer: Tokenizer, task: str, part: Part, count: int, seed: int, temperature: float = 0.0
) -> dict[str, Any]:
    """`judge` of answers to `count` questions of each group, drawn by `seed`, and the answers."""
    asked = {group: draw_questions(pool, count, seed) for group, pool in questions_of(task, part)[1].items()}
    how = {"temperature": temperature, "seed": seed, "form": TASKS[task].form or None}
    said = {group: score_model(model, tokenizer, World(), drawn, **how) for group, drawn in asked.items()}
    return {**judge(task, asked, said), "answers": {group: result["answers"] for group, result in said.items()}}


def score(trial: Trial, adapter: Path) -> dict[str, float]:
    """Measures of a trained adapter; its answers go beside it."""
    base = trial.settings["checkpoint_dir"]
    found = measure(load_model(base, read_adapter(adapter)), Tokenizer(base), **trial.scoring)
    write_text(adapter.with_name("answers.json"), json.dumps(found.pop("answers"), indent=1) + "\n")
    return found


# == data ==


def prepare_pairs(args: Settings, split: str, folder: Path) -> None:
    """Write the preference pairs of a split, at most 456, in the proportions of `PAIR_SHARES`."""
    world, rng = World(), random.Random(42)
    shares = {"harmless": PAIR_SHARES["harmless_share"], "harmful": 1 - sum(PAIR_SHARES.values())}
    most = [int((len(world.requests(kind, split)) - 1) / share) for kind, share in shares.items()]
    write_preferences(
        draw_requests(world, split, rng, pairs=min(456, *most), **PAIR_SHARES),
        rng,
        folder,
        source="micro-world 0, values",
        tokenizer=Tokenizer(args.checkpoint_dir),
        max_seq_length=256,
        test_fraction=0.2,  # joined again
        seed=42,
        num_proc=1,
    )


def prepare_answers(args: Settings, task: str, questions: list[Question], folder: Path) -> None:
    """Write questions with right answers in the task's form."""
    write_answers(
        questions,
        TASKS[task].form,
        folder,
        source=f"micro-world 0, {task}",
        tokenizer=Tokenizer(args.checkpoint_dir),
        max_seq_length=256,
        test_fraction=0.5,  # joined again
        seed=0,
        num_proc=1,
    )


def prepare(args: Settings, task: str, part: Part) -> None:
    """The dataset of a task: its second split are the questions that are asked after training."""
    folders = {split: args.out_dir / "data" / f"{task}-{part}-{split}" for split in ("train", "test")}
    if task == "values":
        prepare_pairs(args, TRAIN, folders["train"])
        prepare_pairs(args, {"valid": VALID, "reported": UNSEEN}[part], folders["test"])
    else:
        train, groups = questions_of(task, part)
        prepare_answers(args, task, train, folders["train"])
        prepare_answers(args, task, [q for group in groups.values() for q in group], folders["test"])
    splits = {split: concatenate_datasets([*load_from_disk(str(folder)).values()]).shuffle(seed=0, keep_in_memory=True)
              for split, folder in folders.items()}  # fmt: skip
    meta = json.loads((folders["train"] / "meta.json").read_text(encoding="utf-8"))
    counts = {split: len(rows) for split, rows in splits.items()}
    write_dataset(args.out_dir / "data" / f"{task}-{part}", splits, {**meta, "counts": counts})


# == trials ==


def scoring_of(args: Settings, task: str, part: Part, seed: int) -> dict[str, Any]:
    """The arguments of `measure`."""
    told = {"task": task, "part": part, "count": args.questions, "seed": seed}
    temperature = TASKS[task].temperature
    return {**told, "temperature": temperature} if temperature else told


def make_trial(args: Settings, task: str, method: str, rate: float, seed: int, part: Part) -> Trial:
    data_dir = args.out_dir / "data" / f"{task}-{part}"
    rows = json.loads((data_dir / "meta.json").read_text(encoding="utf-8"))["counts"]["train"]
    settings: dict[str, Any] = {"data_dir": data_dir, "checkpoint_dir": args.checkpoint_dir, "learning_rate": rate,
                                "seed": seed, "accelerator": "cpu", "save_interval": 10**6}  # fmt: skip
    if task == "values":
        steps = round(args.pair_epochs * math.ceil(rows / alignerDPO.batch_size))
        settings |= {"epochs": args.pair_epochs}
    else:
        steps, per_epoch = args.steps, math.ceil(rows / args.batch_size)
        settings |= {"batch_size": args.batch_size, "micro_batch_size": args.batch_size,
                     "epochs": steps / per_epoch, "warmup_epochs": 0.1 * steps / per_epoch}  # fmt: skip
    settings |= {"eval_interval": max(1, steps // 8), "eval_rows": 64}
    scoring = scoring_of(args, task, part, seed)
    name = f"{task}-{method}-{part}-lr{rate:g}-seed{seed}"
    return Trial(name, VARIANTS[method], settings, "dpo" if task == "values" else "sft", scoring)


def score_base(args: Settings) -> list[Row]:
    """The same questions put to the base model, without training."""
    rows = []
    model, tokenizer = load_model(args.checkpoint_dir), Tokenizer(args.checkpoint_dir)
    base = base_fingerprint(args.checkpoint_dir)["weights"]
    cells = [(task, seed) for task in args.tasks for seed in args.seeds]
    for task, seed in tqdm(cells, desc="base model", unit="score"):
        told = scoring_of(args, task, "reported", seed)
        path = args.out_dir / "base" / f"{task}-seed{seed}.json"
        same = {**told, "base": base}
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if known.get("identity") != same:
            found = measure(model, tokenizer, **told)
            known = {"identity": same, **found}
            write_text(path, json.dumps(known, indent=1) + "\n")
        scores = {k: v for k, v in known.items() if k not in ("identity", "answers")}
        rows.append({"task": task, "method": BASE, "part": "reported", "learning_rate": None, "seed": seed,
                     "parameters": 0, "error": "", **scores})  # fmt: skip
    return rows


def as_row(record: Record) -> Row:
    """A trial as a line of results.csv."""
    trial, summary = record["trial"], record.get("summary", {})
    task, method, _ = trial["name"].split("-", 2)
    return {
        "task": task,
        "method": method,
        "part": trial["scoring"]["part"],
        "learning_rate": trial["settings"]["learning_rate"],
        "seed": trial["settings"]["seed"],
        "parameters": summary.get("trainable_parameters"),
        "steps": summary.get("steps"),
        "val_loss": summary.get("last_val_loss"),
        "seconds": record.get("seconds"),
        "error": record.get("error", ""),
        **record.get("scores", {}),
    }


def run_study(args: Settings) -> tuple[list[Record], list[Record]]:
    """The trials that choose a learning rate, and those of the table, one for each seed at the chosen rate."""
    folder, pairs = args.out_dir / "runs", [(task, method) for method in args.methods for task in args.tasks]
    grid = [make_trial(args, *pair, rate, args.sweep_seed, "valid") for rate in args.learning_rates for pair in pairs]
    swept = run_trials(grid, folder, score, jobs=args.jobs, desc="choosing rates")
    final = []
    for i, pair in enumerate(pairs):
        try:
            chosen = choose(swept[i :: len(pairs)], key=lambda record: record["scores"]["right"])
        except UserError as error:
            log(f"{' '.join(pair)} is left out: {error}")
            continue
        rate = chosen["trial"]["settings"]["learning_rate"]
        final += [make_trial(args, *pair, rate, seed, "reported") for seed in args.seeds]
    return swept, run_trials(final, folder, score, jobs=args.jobs, desc="seeds")


# == reports ==


def methods_of(rows: list[Row]) -> dict[str, int]:
    """{method: trainable parameters}, the base first."""
    known = {row["method"]: row["parameters"] for row in rows if row["parameters"] is not None}
    return dict(sorted(known.items(), key=lambda pair: pair[0] != BASE))


def tasks_of(rows: list[Row]) -> list[str]:
    return [task for task in TASKS if any(row["task"] == task for row in rows)]


def values_of(rows: list[Row], task: str, method: str, name: str) -> dict[int, float]:
    """{seed: share} of a measure, of the reported trials that did not fail."""
    wanted = (task, method, "reported", "")
    own = [row for row in rows if (row["task"], row["method"], row["part"], row["error"]) == wanted]
    return {row["seed"]: row[name] for row in own}


def label(method: str) -> str:
    return VARIANTS[method].label if method in VARIANTS else method


def percent(values: list[float], sign: str = "") -> str:
    """Mean and half of the 95 % interval: "97.5 ± 1.3"; a dash where there is no value."""
    if not values:
        return "–"
    mean, half = interval(values)
    return f"{100 * mean:{sign}.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")


def results_table(rows: list[Row], tasks: list[str]) -> str:
    """A line for each method, a column for each measure of each task."""
    columns = [(task, name) for task in tasks for name in TASKS[task].columns]
    heads = [f"{TASKS[task].title}: {TASKS[task].columns[name]}" for task, name in columns]
    lines = [
        [label(method), f"{n:,}", *(percent([*values_of(rows, task, method, name).values()]) for task, name in columns)]
        for method, n in methods_of(rows).items()
    ]
    return markdown_table(["method", "parameters", *heads], lines)


def differences_table(rows: list[Row]) -> str:
    """One token minus LoRA, in percentage points, paired by the seed and so by the questions."""
    lines = []
    for task in tasks_of(rows):
        for name, head in TASKS[task].columns.items():
            one, lora = (values_of(rows, task, method, name) for method in ("aligner1", "lora"))
            points = percent([one[seed] - lora[seed] for seed in one if seed in lora], "+")
            lines.append([f"{TASKS[task].title}: {head}", points])
    return markdown_table(["one token minus LoRA", "points"], lines)


def rates_table(rows: list[Row]) -> str:
    """The chosen learning rates; a star marks the lowest or highest that was tried."""
    lines = []
    for method in methods_of(rows):
        cells = []
        for task in tasks_of(rows) if method != BASE else ():
            own = [row for row in rows if (row["task"], row["method"]) == (task, method)]
            tried = [row["learning_rate"] for row in own if row["part"] == "valid"]
            rate = next((row["learning_rate"] for row in own if row["part"] == "reported"), None)
            cells.append("–" if rate is None else f"{rate:g}" + "*" * (rate in (min(tried), max(tried))))
        lines += [[label(method), *cells]] * bool(cells)
    return markdown_table(["learning rate", *(TASKS[task].title for task in tasks_of(rows))], lines)


def command_of(args: Settings) -> str:
    """What makes this study, without the flags that have their defaults."""
    unsaid = {"out_dir", "report_dir", "jobs"} | (QUICK.keys() if args.quick else set())
    changed = {
        name: value for name, value in asdict(args).items() if value != getattr(Settings, name) and name not in unsaid
    }
    flags = [
        f"--{k} {' '.join(map(str, v)) if isinstance(v, list | tuple) else str(v).lower()}" for k, v in changed.items()
    ]
    return " ".join(["python studies/reproduce_paper.py", *flags])


def origin(args: Settings, rows: list[Row]) -> str:
    """Command, seeds, versions and duration, on one line."""
    trials = [row for row in rows if row["method"] != BASE]
    minutes = sum(row["seconds"] or 0 for row in trials) / args.jobs / 60
    return (
        f"{command_of(args)}: {len(trials)} trainings, {minutes:.0f} minutes of {args.jobs} processes of one thread "
        f"each, seeds {', '.join(map(str, args.seeds))}, torch {versions()['torch']}"
    )


def report(args: Settings, rows: list[Row]) -> str:
    """table.md"""
    failed = [f"Failed: {row['task']}, {row['method']}, {row['learning_rate']:g}, seed {row['seed']}: {row['error']}"
              for row in rows if row["error"]]  # fmt: skip
    differences = [differences_table(rows)] if {"aligner1", "lora"} <= methods_of(rows).keys() else []
    tasks = tasks_of(rows)
    groups = [[task for task in tasks if (task in KNOWLEDGE) == wanted] for wanted in (False, True)]
    parts = [
        *(results_table(rows, group) for group in groups if group),
        f"""Shares of answers in percent, greedy but for values, which are sampled at temperature
{TASKS["values"].temperature:g}: mean ± half of the 95 % interval (Student's t) over the seeds. Each
seed trains anew and draws its own {args.questions} questions of a group, or takes all where there are fewer, so the
interval covers trainings and questions; where all seeds gave the same it is 0.
""",
        *differences,
        rates_table(rows),
        f"""The rate with the best answers to validation questions, which are none of those above. Tried were
{", ".join(f"{rate:g}" for rate in args.learning_rates)}, with seed {args.sweep_seed}; a star marks the lowest and the
highest of them, beyond which a better one may lie.
""",
        *failed,
        f"Made by {origin(args, rows)}.",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def csv_text(rows: list[Row]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def means(rows: list[Row]) -> list[Row]:
    """The table as lines of a CSV file: mean and half of the interval, as shares."""
    lines = []
    for method, parameters in methods_of(rows).items():
        for task in tasks_of(rows):
            for name in TASKS[task].columns:
                if values := [*values_of(rows, task, method, name).values()]:
                    mean, half = interval(values)
                    lines.append({"method": method, "parameters": parameters, "task": task, "measure": name,
                                  "mean": mean, "half": half, "seeds": len(values)})  # fmt: skip
    return lines


def plot_accuracy(rows: list[Row], path: Path, caption: str) -> None:
    """Accuracy against trainable parameters, the paper's figure 5: Aligners are joined, dotted lines are the base."""
    found = {(line["task"], line["measure"], line["method"]): line for line in means(rows)}
    panels = {title: [line for line in lines if line[0] in tasks_of(rows)] for title, lines in PANELS.items()}
    panels = {title: lines for title, lines in panels.items() if lines}
    figure = make_figure(5 * len(panels), 5)
    markers: dict[str, Any] = {}
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, (task, name, what) in enumerate(lines):
            own = {method: line for (*of, method), line in found.items() if of == [task, name]}
            if BASE in own:
                axes.axhline(100 * own.pop(BASE)["mean"], color=f"C{i}", ls=":", lw=1)
            aligners = [line for method, line in own.items() if VARIANTS[method].method == "aligner"]
            x, y = [line["parameters"] for line in aligners], [100 * line["mean"] for line in aligners]
            axes.plot(x, y, color=f"C{i}", label=what)
            for method, line in own.items():
                style = {"fmt": MARKERS[VARIANTS[method].method], "color": f"C{i}", "capsize": 3}
                axes.errorbar(line["parameters"], 100 * line["mean"], 100 * line["half"], **style)
                look = {"marker": style["fmt"], "color": "black", "ls": ""}
                markers.setdefault(VARIANTS[method].label.partition(",")[0], axes.plot([], [], **look)[0])
        axes.set(title=title, xscale="log", xlabel="trainable parameters", ylabel="right (%)", ylim=(-3, 103))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.legend(markers.values(), markers, loc="outside upper center", ncols=len(markers), fontsize=8)
    figure.supxlabel(textwrap.fill(caption, 60 * len(panels)), fontsize=6)
    save_figure(figure, path)


def plot_curves(records: list[Record], path: Path, caption: str) -> None:
    """Loss on the questions asked, over steps at the chosen rates: the mean over seeds, a line for each method."""
    curves: dict[tuple[str, str], list[list]] = {}
    for record in records:
        if "error" not in record:
            row = as_row(record)
            curves.setdefault((row["task"], row["method"]), []).append(record["curve"])
    tasks = [task for task in TASKS if any(task == known for known, _ in curves)]
    figure = make_figure(4.2 * max(1, len(tasks)), 4)
    for axes, task in zip(figure.subplots(1, max(1, len(tasks)), squeeze=False)[0], tasks, strict=False):
        for (known, method), own in curves.items():
            if known == task:
                steps, losses = [step for step, _ in own[0]], [[loss for _, loss in curve] for curve in own]
                mean = [statistics.mean(at_step) for at_step in zip(*losses, strict=True)]
                axes.plot(steps, mean, marker=".", label=label(method))
        axes.set(title=TASKS[task].title, xlabel="optimiser step", ylabel="loss on the questions asked", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.supxlabel(textwrap.fill(caption, 50 * max(1, len(tasks))), fontsize=6)
    save_figure(figure, path)


def main(args: Settings) -> None:
    if args.quick:
        args = replace(args, **QUICK)
    for name, known in (("methods", VARIANTS), ("tasks", TASKS)):
        if not getattr(args, name) or not set(getattr(args, name)) <= set(known):
            raise UserError(f"{name} is {' '.join(getattr(args, name))}; it can be some of {', '.join(known)}.")
    for task in args.tasks:
        for part in get_args(Part):
            prepare(args, task, part)
    base = score_base(args)
    swept, final = run_study(args)
    rows = base + [as_row(record) for record in swept + final]
    folder, text = args.report_dir or args.out_dir, report(args, rows)
    write_text(folder / "table.md", text)
    write_text(folder / "table.csv", csv_text(means(rows)))
    write_text(folder / "results.csv", csv_text(rows))
    plot_accuracy(rows, folder / "accuracy.png", origin(args, rows))
    plot_curves(final, folder / "curves.png", origin(args, rows))
    print(text, end="")


if __name__ == "__main__":
    cli.run(main, Settings)
