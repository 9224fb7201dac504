"""Trials: many short trainings and their scores, side by side, for studies that compare methods.

Every method gets the same: data, steps, batch, and the same few learning rates to choose from. What a trial gave is one
JSON file, so a study that was stopped goes on where it was.

    trials = [Trial(f"{name}-lr{lr}", variant, {"data_dir": data_dir, "learning_rate": lr, "seed": 0})
              for name, variant in VARIANTS.items() for lr in RATES]
    records = run_trials(trials, out_dir)
    best = choose(records, key=lambda record: -record["summary"]["last_val_loss"])
"""

import hashlib
import importlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

import torch
from tqdm import tqdm

from lit_llama.checkpoint import base_fingerprint, versions, write_text
from lit_llama.report import read_metrics
from lit_llama.utils import UserError
from scripts.count_parameters import Variant

Record = dict[str, Any]  # what a trial gave, see `run_trial`


@dataclass(frozen=True)
class Trial:
    """One training and its score.

    Args:
        name: of its folder; each trial of a study has its own.
        variant: what is trained.
        settings: flags of the finetuning script, `data_dir` and `learning_rate` among them; the others are its
            defaults, but nothing is sampled while it trains.
        objective: "sft" is finetune/METHOD.py, "dpo" finetune/alignerDPO.py.
        scoring: whatever the study's score function wants to be told; JSON.
    """

    name: str
    variant: Variant
    settings: dict[str, Any]
    objective: Literal["sft", "dpo"] = "sft"
    scoring: dict[str, Any] = field(default_factory=dict)


Score = Callable[[Trial, Path], dict[str, Any]]  # of the trained adapter's file; JSON


def prepare_run(trial: Trial, out_dir: Path) -> tuple[Callable[[Any], None], Any]:
    """`main` of the trial's script and all its settings."""
    script = importlib.import_module(f"finetune.{'alignerDPO' if trial.objective == 'dpo' else trial.variant.method}")
    own: dict[str, Any] = {"out_dir": out_dir, "overwrite": True, "sample_prompts": 0, **trial.settings}
    if trial.objective == "dpo":
        own = {"drift_prompts": 0, **own, "method": trial.variant.method, "method_config": trial.variant.settings}
    else:
        own |= trial.variant.settings
    return script.main, script.Settings(**own)


def identity(trial: Trial, settings: Any) -> dict[str, Any]:
    """What a finished trial must share with the one wanted, for its record to stand: all settings, the weights of the
    base, the rows of the data, and what was scored. Where the folders lie does not matter."""
    rows = hashlib.sha256()
    for path in sorted(Path(settings.data_dir).glob("*/*.arrow")):
        rows.update(path.read_bytes())
    named = {k: v for k, v in asdict(settings).items() if k not in ("out_dir", "data_dir", "checkpoint_dir")}
    told = {
        "method": trial.variant.method,
        "objective": trial.objective,
        "settings": named,
        "scoring": trial.scoring,
        "base": base_fingerprint(settings.checkpoint_dir)["weights"],
        "rows": rows.hexdigest(),
    }
    return json.loads(json.dumps(told, default=str))


def run_trial(trial: Trial, out_dir: Path, score: Score | None = None) -> Record:
    """Trains and scores, or reads what an earlier call left; what the training says goes to the trial's log.txt.

    Returns:
        trial: as given; identity; summary: of the training run; curve: [step, validation loss] pairs; scores: what
        `score` returned; seconds: of all of it; versions. Of one that failed: trial and error, and nothing is kept.
    """
    run, began = Path(out_dir) / trial.name, time.perf_counter()
    path, log_path = run / "record.json", run / "log.txt"
    told = json.loads(json.dumps(asdict(trial), default=str))
    try:
        main, settings = prepare_run(trial, run)
        same = identity(trial, settings)
        if path.is_file() and (record := json.loads(path.read_text(encoding="utf-8")))["identity"] == same:
            return {**record, "trial": told}
        run.mkdir(parents=True, exist_ok=True)
        with log_path.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
            main(settings)
            scores = {} if score is None else score(trial, run / "last.safetensors")
        losses = {step: row["val/loss"] for step, row in read_metrics(run / "metrics.csv").items() if "val/loss" in row}
        record = {
            "trial": told,
            "identity": same,
            "summary": json.loads((run / "summary.json").read_text(encoding="utf-8")),
            "curve": [list(pair) for pair in losses.items()],
            "scores": scores,
            "seconds": round(time.perf_counter() - began, 1),
            "versions": versions(),
        }
        write_text(path, json.dumps(record, indent=1) + "\n")
        return record
    except Exception as error:
        run.mkdir(parents=True, exist_ok=True)
        with log_path.open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        return {"trial": told, "error": f"{type(error).__name__}: {error}"}


def start_worker() -> None:
    """One thread; ends with the process that started it, however that ends."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_trials(
    trials: Iterable[Trial], out_dir: Path, score: Score | None = None, *, jobs: int = 2, desc: str = "trials"
) -> list[Record]:
    """The records of all trials, in their order; one that failed is named, and the others go on.

    Args:
        out_dir: a folder each goes in there.
        score: a function of a module (other processes import it).
        jobs: processes of one thread each; 1 is this process.
        desc: what the bar says.

    Raises:
        UserError: a process was killed.
    """
    trials = list(trials)
    twice = {trial.name for trial in trials if [t.name for t in trials].count(trial.name) > 1}
    if twice:
        raise ValueError(f"several trials are named {', '.join(sorted(twice))}")
    bar = tqdm(total=len(trials), desc=desc, unit="trial", smoothing=0.05)

    def finished(record: Record) -> Record:
        bar.update()
        if "error" in record:
            name = record["trial"]["name"]
            bar.write(f"{name} failed: {record['error']} (see {Path(out_dir) / name / 'log.txt'})", file=sys.stderr)
        return record

    with bar:
        if jobs == 1:
            return [finished(run_trial(trial, out_dir, score)) for trial in trials]
        # spawned: a fork of a process with threads may hang
        pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker)
        try:
            futures = [pool.submit(run_trial, trial, out_dir, score) for trial in trials]
            for future in as_completed(futures):
                finished(future.result())
        except BrokenProcessPool:
            raise UserError(
                "A process of the study was killed, perhaps for want of memory; run it again to go on, with fewer jobs."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


def choose(records: Iterable[Record], key: Callable[[Record], Any]) -> Record:
    """The record with the highest `key`; of equal ones that with the lowest last validation loss.

    Raises:
        UserError: all of them failed.
    """
    records = list(records)
    done = [record for record in records if "error" not in record]
    if not done:
        raise UserError(f"All trials failed, the first with: {records[0]['error']}")
    return max(done, key=lambda record: (key(record), -record["summary"]["last_val_loss"]))


def at_edge(chosen: Record, records: Iterable[Record]) -> bool:
    """Whether the chosen learning rate is the lowest or the highest that was tried, so a better one may lie beyond."""
    rates = [record["trial"]["settings"]["learning_rate"] for record in records]
    return chosen["trial"]["settings"]["learning_rate"] in (min(rates), max(rates))


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval by Student's t; the half is nan for a single value."""
    from scipy.stats import t

    values = list(values)
    if len(values) == 1:
        return values[0], math.nan
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(half)
