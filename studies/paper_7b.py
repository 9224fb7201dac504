"""Reproduce the paper's tables and figures with one command: prepare data, train what is missing, evaluate, compare.

    --table 2           Vicuna benchmark, answers compared in pairs by a judge (needs --judge_url)
    --table 3           Vicuna benchmark, answers graded one by one (needs --judge_url)
    --table fig3        safety: 83 questions in 8 categories, judged in pairs (needs --judge_url)
    --table fig5_left   MMLU, one-shot, of models finetuned on Alpaca
    --table fig5_right  GSM8K, of models finetuned on MetaMathQA
    --table all         all of these

Each step is a command of this repository; steps that the same command completed are skipped, so a stopped study
continues when it is started again. --dry_run lists the commands with predicted GPU hours and memory. The report
(report.md, report.csv and a figure for each table) has the paper's numbers for GSM8K and for the base on MMLU.
"""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.settings import Checked, PositiveFloat, PositiveInt, as_flags


@dataclass
class Settings(Checked):
    table: Literal["2", "3", "fig3", "fig5_left", "fig5_right", "all"] = "all"  # what to reproduce
    checkpoint_dir: Path = Path("checkpoints/Llama-2-7B")  # the base model's folder
    out_dir: Path = Path("out/paper_7b")  # data, runs, results and the report
    methods: tuple[str, ...] = ()  # rows of the tables, such as aligner1 and lora (default: all of each table)
    dry_run: bool = False  # list the commands with predicted GPU hours and memory, and run nothing

    # == Data (default: downloaded from the Hugging Face Hub) ==
    alpaca_file: Path | None = None  # finetuning rows in Alpaca's format
    metamath_file: Path | None = None  # finetuning rows with query and response
    beaver_file: Path | None = None  # preference rows of PKU-SafeRLHF
    gsm8k_file: Path | None = None  # GSM8K's test rows
    mmlu_file: Path | None = None  # mmlu.zip or a folder of CSV files
    vicuna_file: Path | None = None  # the 80 questions
    safety_file: Path | None = None  # the 83 questions

    # == Judge (see evaluate/vicuna.py) ==
    judge_url: str | None = None  # OpenAI-compatible endpoint
    judge_model: str | None = None  # the model's name there
    judge_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the API key; may be unset
    judge_body: dict[str, Any] = field(default_factory=dict)  # more fields of a request, as JSON; null removes one

    # == A smaller study ==
    limit: PositiveInt | None = None  # evaluate only this many questions (MMLU: of each subject)
    max_steps: PositiveInt | None = None  # train only this many steps
    max_seq_length: PositiveInt | None = None  # truncate rows to this many tokens (default: 512, Beaver 1024)
    max_new_tokens: PositiveInt | None = None  # longest answer in tokens (default: each evaluation's)

    # == Device ==
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto" uses a GPU if there is one
    gpu_tflops: PositiveFloat = 350.0  # bf16 TFLOP/s assumed for training and prompts (an H100 PCIe, 45%)
    gpu_bandwidth: PositiveFloat = 2000.0  # GB/s assumed for decoding


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import numpy as np
import torch

from evaluate.endpoint import Endpoint
from lit_llama.console import call
from lit_llama.memory import count_parameters, training_memory
from lit_llama.methods import METHODS as NETWORKS
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.run.report import make_figure, save_figure
from lit_llama.storage.files import claim, write_text
from lit_llama.storage.schema import read_json
from lit_llama.tables import csv_text, markdown_table
from lit_llama.utils import UserError, log
from scripts.count_parameters import ALIGNER300, VARIANTS, Variant

ROOT = Path(__file__).parent.parent.resolve()
TableName = Literal["2", "3", "fig3", "fig5_left", "fig5_right"]

# The paper states no settings for the methods it compares with: sizes and, in SFT, learning rates are Lit-LLaMA's
# defaults. In DPO, all methods have the Aligner's learning rate.
METHODS: dict[str, Variant] = {
    **{name: VARIANTS[name] for name in ("aligner1", "aligner10", "aligner100")},
    "aligner300": ALIGNER300,
    "adapter": Variant("LLaMA-Adapter", "adapter", {"adapter_prompt_length": 10}),
    "lora": VARIANTS["lora"],
}
LORA_LEARNING_RATE = 3e-4  # in SFT
BASE = "base"
JUDGEMENTS = "judgements.jsonl"  # of all comparisons, so that an answer in several of them is graded once

# All settings of every finetuning run: the paper's, as in howto/recipes.
SFT = {"batch_size": 64, "micro_batch_size": 8, "learning_rate": 9e-3, "lr_schedule": "constant", "weight_decay": 0.02,
       "grad_clip": 1.0, "adapter_start_layer": 2, "seed": 1337, "eval_interval": 390, "eval_rows": 512,
       "save_interval": 390, "sample_prompts": 0, "gradient_checkpointing": False}  # fmt: skip
TRAINING: dict[str, dict[str, Any]] = {
    "alpaca": {**SFT, "epochs": 8, "warmup_epochs": 2},
    "metamath": {**SFT, "epochs": 3, "warmup_epochs": 1},
    "beaver": {**SFT, "epochs": 2, "warmup_epochs": 0.5},
    "beaver_dpo": {**SFT, "epochs": 3, "warmup_epochs": 0.5, "learning_rate": 1e-4, "micro_batch_size": 4, "beta": 0.1,
                   "loss_type": "sigmoid", "sft_weight": 0},
}  # fmt: skip
ROWS = {"alpaca": 52_000, "metamath": 395_000, "beaver": 160_000, "beaver_dpo": 160_000}  # for predictions
TOKENS = {"alpaca": 150, "metamath": 300, "beaver": 150, "beaver_dpo": 300}  # per row or pair, estimated


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        name: shown in the log and the plan.
        command: script and arguments.
        done: the file that the command writes last.
        hours: predicted for one GPU.
        gigabytes: returns the predicted memory of the GPU; this may take seconds.
        requests: number of judge requests, by what is judged; requests that several steps share are sent once.
    """

    name: str
    command: list[str]
    done: Path
    hours: float = 0.0
    gigabytes: Callable[[], float] = lambda: 0.0
    requests: dict[str, int] = field(default_factory=dict)

    def complete(self, completed: dict[str, list[str]]) -> bool:
        """Return whether this command, or the same with a judge, is among the completed ones, by name."""
        then = completed.get(self.name, [])
        same, further = then[: len(self.command)] == self.command, then[len(self.command) :]
        return self.done.is_file() and same and (not further or further[0].startswith("--judge_"))

    def remove_judged(self, completed: dict[str, list[str]]) -> None:
        """Remove the summary of the same command with another judge, whose replies are cached."""
        then, now = (
            [*takewhile(lambda word: not word.startswith("--judge_"), words)]
            for words in (completed.get(self.name, []), self.command)
        )
        if then == now:
            self.done.unlink(missing_ok=True)

    def made(self, words: list[str]) -> bool:
        """Return whether a command uses the folder that this step writes."""
        folder = str(self.done.parent)
        return any(word == folder or word.startswith(f"{folder}/") for word in words)


class Number(NamedTuple):
    """A result: its value, its 95% interval and the number of questions; all None if nothing was judged."""

    value: float | None
    interval: list[float] | None
    n: int | None


@dataclass(frozen=True)
class Cell:
    """One number of a table: its row, what it is, the file it is read from, and the paper's number if it is known."""

    row: str
    column: str
    summary: Path
    read: Callable[[dict[str, Any]], "Number"]
    paper: float | None = None


@dataclass(frozen=True)
class Table:
    """A table of the paper: the methods it needs, its notes, and a function from a study to steps and cells."""

    title: str
    methods: tuple[str, ...]
    notes: tuple[str, ...]
    plan: Callable[["Study"], tuple[list[Step], list[Cell]]]


class Study:
    """The steps and cells of one table under some settings."""

    def __init__(self, settings: Settings, methods: tuple[str, ...]) -> None:
        self.settings = settings
        self.methods = tuple(name for name in methods if not settings.methods or name in settings.methods)
        self.parameters, _ = count_parameters(LLaMA, base_config(settings.checkpoint_dir))

    # == steps ==

    def prepare(self, dataset: str) -> Step:
        """Return the step that writes a dataset's folder."""
        s, output = self.settings, self.data(dataset)
        script, file, flags = {
            "alpaca": ("prepare_alpaca", s.alpaca_file, {}),
            "metamath": ("prepare_metamath", s.metamath_file, {}),
            "beaver": ("prepare_beaver_safe", s.beaver_file, {"stage": "sft"}),
            "beaver_dpo": ("prepare_beaver_safe", s.beaver_file, {"stage": "dpo"}),
        }[dataset]
        if dataset.startswith("beaver") and file is None:
            flags = {**flags, "revision": "v0"}
        flags = {"checkpoint_dir": s.checkpoint_dir, "output_dir": output, "data_file": file, **flags,
                 "max_seq_length": s.max_seq_length}  # fmt: skip
        return Step(f"prepare {dataset}", [f"scripts/{script}.py", *as_flags(flags)], output / "meta.json")

    def train(self, method: str, dataset: str) -> list[Step]:
        """Return the steps that lead to an adapter: the data, for DPO the SFT before it, and the training."""
        s, out_dir, script = self.settings, self.run(method, dataset), METHODS[method].method
        before, flags = [], {**TRAINING[dataset], **METHODS[method].settings}
        if script == "lora":
            del flags["adapter_start_layer"]
            flags["learning_rate"] = LORA_LEARNING_RATE
        is_dpo = dataset == "beaver_dpo"
        if is_dpo:
            before = self.train(method, "beaver")
            init_adapter = self.run(method, "beaver") / "best.safetensors"
            script, flags = "alignerDPO", {**TRAINING[dataset], "method": script, "init_adapter": init_adapter}
        flags |= {"checkpoint_dir": s.checkpoint_dir, "data_dir": self.data(dataset), "out_dir": out_dir,
                  "accelerator": s.accelerator, "max_steps": s.max_steps, "resume": True}  # fmt: skip
        steps = ROWS[dataset] * TRAINING[dataset]["epochs"] / 64
        # per weight: with frozen weights, 2 for a token forward and 2 for the gradient of its activations
        operations = 4 * min(steps, s.max_steps or steps) * 64 * TOKENS[dataset]
        if is_dpo:
            operations += 2 * ROWS[dataset] * TOKENS[dataset]  # the reference of all pairs
        hours = operations * self.parameters / (s.gpu_tflops * 1e12) / 3600
        length = s.max_seq_length or (1024 if dataset.startswith("beaver") else 512)  # as prepared
        sequences = TRAINING[dataset]["micro_batch_size"] * (1 + is_dpo)  # at most: pairs may share rows
        gigabytes = partial(training_gigabytes, s.checkpoint_dir, method, sequences, length)
        step = Step(f"train {method} on {dataset}", [f"finetune/{script}.py", *as_flags(flags)],
                    out_dir / "summary.json", hours, gigabytes)  # fmt: skip
        return [*before, self.prepare(dataset), step]

    def evaluate(
        self, benchmark: str, name: str, flags: dict[str, Any], hours: float, judge: dict[str, Any] | None = None
    ) -> Step:
        """Return the step that evaluates a model, or a pair of models, on a benchmark.

        Args:
            judge: flags without which the answers are generated and not judged.
        """
        s, output = self.settings, self.results(benchmark, name)
        flags = {"checkpoint_dir": s.checkpoint_dir, "output_dir": output, **flags,
                 "accelerator": s.accelerator, "limit": s.limit, **(judge or {})}  # fmt: skip
        return Step(f"{benchmark} of {name}", [f"evaluate/{benchmark}.py", *as_flags(flags)], output / "summary.json",
                    hours, lambda: 2 * self.parameters / 1e9 + 10)  # fmt: skip

    def decoding_hours(self, questions: int, batch_size: int = 16) -> float:
        """Predict the time of answers of 512 tokens, limited by reading the weights once per token of a batch."""
        return 2 * self.parameters * questions * 512 / batch_size / (self.settings.gpu_bandwidth * 1e9) / 3600

    # == folders ==

    def data(self, dataset: str) -> Path:
        return self.settings.out_dir / "data" / dataset

    def run(self, method: str, dataset: str) -> Path:
        return self.settings.out_dir / "runs" / f"{dataset}-{method}"

    def results(self, benchmark: str, method: str) -> Path:
        return self.settings.out_dir / "results" / f"{benchmark}-{method}"


def base_config(checkpoint_dir: Path) -> LLaMAConfig:
    """Return the configuration of the base model; that of Llama 2 7B if there is none."""
    path = checkpoint_dir / "lit_config.json"
    return LLaMAConfig.from_json(path) if path.is_file() else LLaMAConfig.from_name("Llama-2-7B")


@cache
def training_gigabytes(checkpoint_dir: Path, method: str, sequences: int, tokens: int) -> float:
    """Estimate the memory of a step with this micro-batch in bf16, half of whose tokens are predicted."""
    config, network = base_config(checkpoint_dir), NETWORKS[METHODS[method].method]
    tokens = min(tokens, config.block_size)
    config = network.config_class(**{**vars(config), **METHODS[method].settings})
    memory = training_memory(network, config, sequences=sequences, tokens=tokens, labels=sequences * tokens // 2,
                             dtype=torch.bfloat16, gradient_checkpointing=SFT["gradient_checkpointing"])  # fmt: skip
    return memory.total / 1e9


# == tables ==


def mmlu_table(study: Study) -> tuple[list[Step], list[Cell]]:
    flags = {"data_file": study.settings.mmlu_file, "shots": 1}
    hours = 2 * study.parameters * 14_042 * 400 / (study.settings.gpu_tflops * 1e12) / 3600
    return accuracies(study, "mmlu", "alpaca", flags, hours, {BASE: 0.2555})


def gsm8k_table(study: Study) -> tuple[list[Step], list[Cell]]:
    flags = {"data_file": study.settings.gsm8k_file, "max_new_tokens": study.settings.max_new_tokens}
    paper = {"aligner1": 0.053, "aligner10": 0.103, "aligner100": 0.163, "aligner300": 0.262, "adapter": 0.252,
             "lora": 0.355}  # fmt: skip
    return accuracies(study, "gsm8k", "metamath", flags, study.decoding_hours(1_319, batch_size=32), paper)


def accuracies(
    study: Study, benchmark: str, dataset: str, flags: dict[str, Any], hours: float, paper: dict[str, float]
) -> tuple[list[Step], list[Cell]]:
    """Return the plan of a table of accuracies, with a row for the base if the paper has its number."""
    steps, cells = [], []
    for method in (BASE, *study.methods) if BASE in paper else study.methods:
        adapter = None
        if method != BASE:
            steps += study.train(method, dataset)
            adapter = study.run(method, dataset)
        steps.append(study.evaluate(benchmark, method, {"adapter": adapter, **flags}, hours))
        cells.append(Cell(label(method), "accuracy", steps[-1].done, read_accuracy, paper.get(method)))
    return steps, cells


def judged(benchmark: str, dataset: str, questions: int, file: str, read: dict[str, Callable]) -> Callable:
    """Return the plan of a table in which a judge compares each Aligner with the other methods."""

    def plan(study: Study) -> tuple[list[Step], list[Cell]]:
        s, steps, cells = study.settings, [], []
        for method in study.methods:
            steps += study.train(method, dataset)
        aligners = [method for method in study.methods if method.startswith("aligner")]
        for method in aligners:
            for other in (name for name in study.methods if not name.startswith("aligner")):
                flags = {
                    "adapter": study.run(method, dataset),
                    "against": study.run(other, dataset),
                    "data_file": getattr(s, file),
                    "max_new_tokens": s.max_new_tokens,
                    "skip_long": True,
                }
                hours = study.decoding_hours(2 * questions)
                judge = {"judge_url": s.judge_url, "judge_model": s.judge_model}
                if s.judge_url:
                    judge |= {"judge_cache": s.out_dir / JUDGEMENTS, "judge_body": s.judge_body or None,
                              "judge_key_env": s.judge_key_env}  # fmt: skip
                n = min(questions, s.limit or questions)
                requests = {f"{benchmark}: {method} against {other}": 2 * n}  # in both orders
                if benchmark == "vicuna":
                    requests |= {f"{benchmark}: {method}": n, f"{benchmark}: {other}": n}
                step = study.evaluate(benchmark, f"{method}-{other}", flags, hours, judge)
                steps.append(replace(step, requests=requests))
                cells += [Cell(f"{label(method)} against {label(other)}", column, step.done, reader)
                          for column, reader in read.items()]  # fmt: skip
        return steps, cells

    return plan


def label(method: str) -> str:
    return "the base alone" if method == BASE else METHODS[method].label


def read_accuracy(summary: dict[str, Any]) -> Number:
    return Number(summary["accuracy"], summary["interval"], summary["n"])


def read_judged(kind: str, name: str, summary: dict[str, Any]) -> Number:
    part = summary.get(kind, {}).get("all", {})
    return Number(part.get(name), part.get("interval"), part.get("n"))


read_pairs = partial(read_judged, "pairs", "adjusted_rate")  # (wins + ties / 2) / n
read_grades = partial(read_judged, "single", "difference")  # of the mean grades, from 1 to 10


VICUNA_NOTE = (
    "The settings of the paper's answers and of its judge are not known. By default, the first author's script samples "
    "at temperature 0.7 and stops after 100 tokens, while answers here are greedy, with up to 1,024 tokens. Here the "
    "judge states its scores before it explains them (howto/evaluate.md)."
)
FEW_METHODS = ("aligner1", "aligner10", "adapter", "lora")
TABLES: dict[TableName, Table] = {
    "2": Table(
        "Table 2: Vicuna benchmark, adjusted rate of the Aligner",
        FEW_METHODS,
        ("The paper's adjusted rates follow from (wins + ties / 2) / 80 but for one cell: 28 wins, 26 ties and 26 "
         "losses are 0.5125, not 0.528.", "With 80 questions the 95% interval of a rate is 0.08 to 0.095 wide on each "
         "side. Only one of the paper's cells differs from 0.5 by more.", VICUNA_NOTE),
        judged("vicuna", "alpaca", 80, "vicuna_file", {"adjusted rate": read_pairs}),
    ),
    "3": Table(
        "Table 3: Vicuna benchmark, answers graded one by one",
        FEW_METHODS,
        (VICUNA_NOTE,),
        judged("vicuna", "alpaca", 80, "vicuna_file", {"difference of the mean grades": read_grades}),
    ),
    "fig3": Table(
        "Figure 3: safety after DPO, adjusted rate of the Aligner",
        ("aligner1", "adapter", "lora"),
        ("Rates by category are in the results of each comparison.",),
        judged("safety", "beaver_dpo", 83, "safety_file", {"adjusted rate": read_pairs}),
    ),
    "fig5_left": Table(
        "Figure 5 left: MMLU, one-shot, after finetuning on Alpaca",
        FEW_METHODS,
        ("The paper's base (0.2555) is at chance. A correct base has about 0.45 at five shots, scored by letters. The "
         "first author's script compares generated texts instead (howto/evaluate.md).",),
        mmlu_table,
    ),
    "fig5_right": Table(
        "Figure 5 right: GSM8K after finetuning on MetaMathQA",
        ("aligner1", "aligner10", "aligner100", "aligner300", "adapter", "lora"),
        ("The paper's numbers are read off its plot. The first author's script cuts off answers after 200 tokens.",
         "Others report 0.641 for LoRA on MetaMathQA at 7B."),
        gsm8k_table,
    ),
}  # fmt: skip


# == running and reporting ==


def main(settings: Settings) -> None:
    names = list(TABLES) if settings.table == "all" else [settings.table]
    plans = {name: TABLES[name].plan(Study(settings, TABLES[name].methods)) for name in names}
    check(settings, plans)
    for name in [name for name, (_, cells) in plans.items() if not cells]:
        log(f"note: table {name} is left out: it compares Aligners with other methods, and --methods lacks one.")
        del plans[name]
    steps = list({tuple(step.command): step for plan, _ in plans.values() for step in plan}.values())
    path = settings.out_dir / "completed.json"
    completed = read_json(path) if path.is_file() else {}
    if settings.dry_run:
        return show_plan(steps, completed)
    figures = [f"{name}.png" for name in TABLES]
    claim(settings.out_dir, ["completed.json", "report.md", "report.csv", JUDGEMENTS, *figures])
    for number, step in enumerate(steps, 1):
        if step.complete(completed):
            log(f"[{number}/{len(steps)}] {step.name}: complete")
            continue
        step.remove_judged(completed)
        run_step(step, number, len(steps))
        # whatever used the earlier result is not complete any more
        completed = {name: words for name, words in completed.items() if not step.made(words)}
        completed[step.name] = step.command
        write_text(path, json.dumps(completed, indent=1) + "\n")
    report(settings, {name: cells for name, (_, cells) in plans.items()})


def check(settings: Settings, plans: dict[TableName, tuple[list[Step], list[Cell]]]) -> None:
    """Check the methods, the tables and the base model. With `--table all`, some tables may be empty.

    Raises:
        UserError: a method is unknown, no table has anything to compare, there is no base model, or the judge's address
            is invalid or lacks a model.
    """
    if unknown := [name for name in settings.methods if name not in METHODS]:
        raise UserError(f"There is no method {unknown[0]!r}; choose from {', '.join(METHODS)}.")
    empty = [name for name, (_, cells) in plans.items() if not cells]
    if len(empty) == len(plans):
        raise UserError(
            f"--table {empty[0]} compares Aligners with other methods; --methods needs at least one of each from "
            f"{', '.join(TABLES[empty[0]].methods)}."
        )
    if settings.judge_url:
        Endpoint(settings.judge_url, key_env=settings.judge_key_env)
        if settings.judge_model is None and not settings.dry_run:
            raise UserError("--judge_url needs the name of a model there; give --judge_model too.")
    if not settings.dry_run and not (settings.checkpoint_dir / "lit_config.json").is_file():
        raise UserError(
            f"There is no base model at {settings.checkpoint_dir}; convert one with scripts/convert_hf_checkpoint.py, "
            "or list the commands with --dry_run."
        )


def show_plan(steps: list[Step], completed: dict[str, list[str]]) -> None:
    """Print every command with predicted hours and memory, and whether it is complete."""
    for step in steps:
        predicted = f"  # predicted: {step.hours:.2f} GPU hours, {step.gigabytes():.0f} GB" if step.hours else ""
        print(shlex.join(["python", *step.command]) + predicted + "  # complete" * step.complete(completed))
    ahead = [step for step in steps if not step.complete(completed)]
    hours = sum(step.hours for step in ahead)
    requests = sum({name: count for step in ahead for name, count in step.requests.items()}.values())
    judge = f" A judge (--judge_url) gets {requests:,} requests for them." if requests else ""
    log(f"{len(steps)} commands, {hours:.1f} GPU hours predicted for those that are not complete.{judge} Predictions "
        "are from parameters and tokens (see --gpu_tflops, --gpu_bandwidth); nothing was measured.")  # fmt: skip


def run_step(step: Step, number: int, total: int) -> None:
    """Run a command.

    Raises:
        UserError: the command failed; its own message is above.
    """
    log(f"[{number}/{total}] {step.name}: {shlex.join(['python', *step.command])}")
    words = [sys.executable, str(ROOT / step.command[0]), *step.command[1:]]
    code = call(words, stdout=2)  # stdout is for the report
    if code == 130:
        raise KeyboardInterrupt
    if code or not step.done.is_file():
        raise UserError(
            f"Step {number} of {total} ({step.name}) ended with exit code {code}; fix the error reported above and "
            f"start the study again: complete steps are kept. To repeat this step with other settings, delete "
            f"{step.done.parent} first."
        )


def report(settings: Settings, tables: dict[TableName, list[Cell]]) -> None:
    """Print the tables and write report.md, report.csv and a figure for each."""
    parts, lines = [], []
    for name, cells in tables.items():
        rows = []
        for cell in cells:
            try:
                number = cell.read(read_json(cell.summary))
            except (LookupError, TypeError) as error:
                raise UserError(f"{cell.summary} is damaged ({error!r}); delete it and run again.") from None
            rows.append((cell, number))
            low, high = number.interval or (None, None)
            lines.append({"table": name, "row": cell.row, "number": cell.column, "here": number.value, "low": low,
                          "high": high, "questions": number.n, "paper": cell.paper})  # fmt: skip
        parts.append(render(TABLES[name], rows))
        figure = settings.out_dir / f"{name}.png"
        if any(number.value is not None for _, number in rows):
            plot(TABLES[name], rows, figure)
        else:
            figure.unlink(missing_ok=True)  # of earlier results
    names = ("limit", "max_steps", "max_seq_length", "max_new_tokens")
    smaller = ", ".join(f"{name} {getattr(settings, name)}" for name in names if getattr(settings, name) is not None)
    caveat = f"\n**A smaller study than the paper's** ({smaller}).\n" if smaller else ""
    text = f"# The paper's benchmarks on {settings.checkpoint_dir}\n{caveat}\n" + "\n".join(parts)
    print(text, end="")
    write_text(settings.out_dir / "report.md", text)
    write_text(settings.out_dir / "report.csv", csv_text(lines))
    log(f"wrote {settings.out_dir / 'report.md'}")


def render(table: Table, rows: list[tuple[Cell, Number]]) -> str:
    """Return a table as Markdown, with its notes."""
    cells = []
    for cell, (value, interval, n) in rows:
        here = "not judged" if value is None else f"{value:.3f}"
        between = "–" if interval is None else "{:.3f} to {:.3f}".format(*interval)
        paper = "see the paper" if cell.paper is None else f"{cell.paper:g}"
        cells.append([cell.row, cell.column, here, between, "–" if n is None else n, paper])
    notes = "".join(f"- {note}\n" for note in table.notes)
    return f"## {table.title}\n\n{markdown_table(['', 'number', 'here', '95%', 'questions', 'paper'], cells)}\n{notes}"


def plot(table: Table, rows: list[tuple[Cell, Number]], path: Path) -> None:
    """Draw our numbers with their intervals, and the paper's as crosses."""
    figure = make_figure(8, 1.5 + 0.4 * len(rows))
    axes = figure.subplots()
    here = [(n.value, place, *(n.interval or (n.value, n.value)))
            for place, (_, n) in enumerate(rows) if n.value is not None]  # fmt: skip
    values, places, lows, highs = np.transpose(here)
    axes.errorbar(values, places, xerr=[values - lows, highs - values], fmt="o", color="C0", capsize=3,
                  label="here, 95% interval")  # fmt: skip
    if paper := [(cell.paper, place) for place, (cell, _) in enumerate(rows) if cell.paper is not None]:
        axes.plot(*np.transpose(paper), "x", color="C1", label="paper")
    axes.set(yticks=range(len(rows)), yticklabels=[cell.row for cell, _ in rows], title=table.title,
             xlabel=rows[0][0].column)  # fmt: skip
    axes.invert_yaxis()
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    save_figure(figure, path)


if __name__ == "__main__":
    cli.run(main, settings)
