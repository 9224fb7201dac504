"""Trials: many short training runs with scores, run in parallel, for studies that compare methods.

The result of a trial is one JSON file, so a stopped study continues where it stopped.

    trials = [Trial(f"{name}-lr{lr}", variant, {**settings, "learning_rate": lr})
              for name, variant in VARIANTS.items() for lr in RATES]
    records = run_trials(trials, out_dir)
    best = choose(records, key=lambda record: -record["summary"]["last_val_loss"])

A study whose next trials depend on the results of earlier ones is a `Plan`, and `run_plans` runs several of them.
"""

import functools
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import shlex
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from datasets import Dataset
from tqdm import tqdm

from lit_llama.checkpoint import base_fingerprint, load_model, read_adapter, versions
from lit_llama.console import end_on_interrupt
from lit_llama.run.report import read_metrics
from lit_llama.settings import as_flags
from lit_llama.storage.files import claim, write_text
from lit_llama.storage.schema import read_json
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError
from scripts.count_parameters import Variant
from studies.protocol import METHODS

Record = dict[str, Any]  # result of a trial, see `run_trial`
UNRECORDED = {"out_dir", "report_dir", "jobs"}  # settings of a study that do not affect its results
# settings of DPO and RL that earlier records do not state, with the values that they had
UNRECORDED_VALUES = {"lora_alpha": 16, "lora_dropout": 0.05}
SCRIPTS = {"dpo": "alignerDPO", "rl": "alignerRL"}  # objectives with one script for all methods


@dataclass(frozen=True)
class Trial:
    """One training run and its score.

    Args:
        name: The name of the trial's folder, unique in the study.
        variant: What is trained.
        settings: The settings of the finetuning script, except those in `studies.protocol.METHODS`. Those in the
            script's `may_change` may be omitted.
        objective: "sft" is finetune/METHOD.py, "dpo" finetune/alignerDPO.py, "rl" finetune/alignerRL.py.
        scoring: Arguments of the study's score function, as JSON.
    """

    name: str
    variant: Variant
    settings: dict[str, Any]
    objective: Literal["sft", "dpo", "rl"] = "sft"
    scoring: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the trial as it is stored in its record."""
        return json.loads(json.dumps(asdict(self), default=str))


Score = Callable[[Trial, Path], dict[str, Any]]  # (trial, folder of its run) -> JSON
S = TypeVar("S")
T = TypeVar("T")
Plan = Generator[list[Trial], list[Record], T]  # yields trials, is sent their records, and returns a result
Cell = tuple[list[Record], list[Record]]  # trials that choose the learning rate, and those at the chosen rate


def prepare_run(trial: Trial, out_dir: Path) -> tuple[Callable[[Any], None], Any]:
    """Return `main` of the trial's script, and its settings.

    Raises:
        TypeError: The trial does not state a setting that affects the result.
    """
    method, size = trial.variant.method, trial.variant.settings
    script = importlib.import_module(f"finetune.{SCRIPTS.get(trial.objective, method)}")
    if trial.objective == "sft":
        of_method = {**METHODS[method], **size}
    else:  # what is no setting of these scripts is passed in `method_config`
        names = {f.name for f in fields(script.Settings)}
        config = {name: value for name, value in METHODS[method].items() if name not in names}
        of_method = {"method": method, "method_config": {**config, **size}}
    settings = {"out_dir": out_dir, **of_method, **trial.settings}
    if missing := sorted({f.name for f in fields(script.Settings)} - settings.keys() - set(script.Settings.may_change)):
        raise TypeError(f"The trial {trial.name} does not state {', '.join(missing)}.")
    return script.main, script.Settings(**settings)


def identity(trial: Trial, settings: Any) -> dict[str, Any]:
    """Return what identifies the result of a trial: a stored record is reused only if its identity is equal.

    These are all settings that change weights or losses, the weights of the base, the rows of the data, and what was
    scored. The locations of folders do not matter.
    """
    rows = hashlib.sha256()
    for split in ("train", "test"):
        rows.update(json.dumps(Dataset.load_from_disk(f"{settings.data_dir}/{split}").to_dict()).encode())
    stated = {k: v for k, v in asdict(settings).items() if k not in settings.may_change}
    if trial.objective == "sft":  # the method is recorded separately
        stated = {k: v for k, v in stated.items() if k not in ("method", "method_config")}
    else:
        config = stated["method_config"].items()
        stated["method_config"] = {k: v for k, v in config if (k, v) not in UNRECORDED_VALUES.items()}
    parts = {
        "method": trial.variant.method,
        "objective": trial.objective,
        "settings": stated,
        "scoring": trial.scoring,
        "base": base_fingerprint(settings.checkpoint_dir)["tensors"],
        "rows": rows.hexdigest(),
    }
    return json.loads(json.dumps(parts, default=str))


def run_trial(trial: Trial, out_dir: Path, score: Score | None = None) -> Record:
    """Train and score, or read the record of an earlier call. The training's output goes to the trial's log.txt.

    Returns:
        trial: as given; identity; summary: of the training run; curve: [step, validation loss] pairs; scores: the
        result of `score`; seconds: of training and scoring; versions. For a failed trial only trial, error and
        versions; its record is not written to disk.

    Raises:
        UserError: The folder has files of these names that this function did not write.
    """
    run, began = Path(out_dir) / trial.name, time.perf_counter()
    path, log_path = run / "record.json", run / "log.txt"
    names = (path.name, log_path.name, "answers.json")  # `score_answers` writes the last
    claim(run, names, adopt=read_record(path).keys() >= {"trial", "identity"})
    if (record := stored_record(trial, out_dir)) is not None:
        return record
    try:
        main, settings = prepare_run(trial, run)
        made_from = identity(trial, settings)
        with log_path.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
            main(settings)
            scores = {} if score is None else score(trial, run)
        losses = {step: row["val/loss"] for step, row in read_metrics(run / "metrics.csv").items() if "val/loss" in row}
        record = {
            "trial": trial.as_json(),
            "identity": made_from,
            "summary": json.loads((run / "summary.json").read_text(encoding="utf-8")),
            "curve": [list(pair) for pair in losses.items()],
            "scores": scores,
            "seconds": round(time.perf_counter() - began, 1),
            "versions": versions(),
        }
        write_text(path, json.dumps(record, indent=1) + "\n")
        return record
    except Exception as error:
        with log_path.open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        return {"trial": trial.as_json(), "error": f"{type(error).__name__}: {error}", "versions": versions()}


def stored_record(trial: Trial, out_dir: Path) -> Record | None:
    """Return the record of an earlier `run_trial`; None if there is none, or if the trial cannot be prepared."""
    run = Path(out_dir) / trial.name
    if not (record := read_record(run / "record.json")):
        return None
    try:
        is_same = record.get("identity") == identity(trial, prepare_run(trial, run)[1])
    except Exception:  # `run_trial` reports it
        return None
    return {**record, "trial": trial.as_json()} if is_same else None


def read_record(path: Path) -> Record:
    """Return what an earlier call wrote to a JSON file; {} if there is no such file, or it is damaged."""
    try:
        return read_json(path)
    except UserError:
        return {}


def stored_result(path: Path, identity: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of `compute`, or what an earlier call with an equal identity wrote to a file.

    Args:
        identity: Everything that the result depends on, as JSON.

    Raises:
        UserError: The file exists and is not such a result.
    """
    known = read_record(path)
    stored = known.pop("identity", None)
    if stored == identity:
        return known
    claim(path.parent, [path.name], adopt=stored is not None)
    result = compute()
    write_text(path, json.dumps({"identity": identity, **result}, indent=1) + "\n")
    return result


def score_answers(measure: Callable[..., dict[str, Any]], trial: Trial, run: Path) -> dict[str, Any]:
    """Return the measures of a trained adapter, and write its answers next to it.

    Args:
        measure: Called with the model, its tokenizer and the trial's `scoring`; returns measures, and the answers under
            "answers".
    """
    base, adapter = trial.settings["checkpoint_dir"], read_adapter(run / "last.safetensors")
    measures = measure(load_model(base, adapter), Tokenizer(base), **trial.scoring)
    write_text(run / "answers.json", json.dumps(measures.pop("answers"), indent=1) + "\n")
    return measures


def start_worker() -> None:
    """Use one thread, and exit on Ctrl-C and when the parent process ends, for whatever reason."""
    end_on_interrupt()
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_trials(
    trials: Iterable[Trial], out_dir: Path, score: Score | None = None, *, jobs: int = 2, desc: str = "trials"
) -> list[Record]:
    """Return the records of all trials, in their order. For the arguments and errors see `run_plans`."""
    trials = list(trials)

    def plan() -> Plan[list[Record]]:
        return (yield trials)

    return run_plans([plan()], out_dir, score, jobs=jobs, desc=desc, expected=len(trials))[0]


def run_plans(
    plans: Sequence[Plan[T]], out_dir: Path, score: Score | None = None, *, jobs: int, desc: str, expected: int
) -> list[T]:
    """Return the results of plans, in their order. A failed trial is reported, and the others continue.

    All plans share the same processes. The next plan starts when the running ones have too few trials left to keep all
    processes busy, so plans finish roughly in their order.

    Args:
        out_dir: Folder for the runs, one folder each.
        score: A function at the top level of a module, so that other processes can import it.
        jobs: Number of processes, of one thread each; 1 is this process. Records of earlier calls are read in this
            process.
        desc: Text of the progress bar.
        expected: Number of trials, as far as it is known; the bar grows if there are more.

    Raises:
        UserError: A process was killed, or two trials have the same name.
    """
    bar, stack = tqdm(total=expected, desc=desc, unit="trial", smoothing=0.05), ExitStack()
    names: set[str] = set()
    ready: deque[tuple[int, int, Callable[[], Record]]] = deque()  # plan, place among its trials, what to call here
    submitted: dict[Future, tuple[int, int]] = {}
    records: dict[int, list[Record | None]] = {}  # of the trials that a plan waits for
    results: dict[int, T] = {}

    @functools.cache
    def pool() -> ProcessPoolExecutor:
        # spawned: a fork of a process with threads may hang
        executor = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker)

        def end(error: type[BaseException] | None, *_: Any) -> None:
            if error is not None:  # `shutdown` would wait until the running trials are done
                for process in multiprocessing.active_children():
                    process.kill()
            executor.shutdown(cancel_futures=True)

        stack.push(end)
        return executor

    def advance(number: int, received: list[Record] | None) -> None:
        """Send a plan the records that it waits for (None starts it), and submit its next trials."""
        try:
            trials = plans[number].send(received)
            while not trials:
                trials = plans[number].send([])
        except StopIteration as stop:
            results[number] = stop.value
            return
        for trial in trials:
            if trial.name in names:
                raise UserError(f"Several trials are named {trial.name}: a setting has the same value twice.")
            names.add(trial.name)
        records[number], bar.total = [None] * len(trials), max(expected, len(names))
        for place, trial in enumerate(trials):
            if jobs == 1:
                ready.append((number, place, functools.partial(run_trial, trial, out_dir, score)))
            elif (record := stored_record(trial, out_dir)) is not None:
                ready.append((number, place, functools.partial(dict, record)))
            else:
                submitted[pool().submit(run_trial, trial, out_dir, score)] = number, place

    def receive(number: int, place: int, record: Record) -> None:
        records[number][place], name = record, record["trial"]["name"]
        bar.set_postfix_str(name, refresh=False)
        bar.update()
        if "error" in record:
            bar.write(f"{name} failed: {record['error']} (see {Path(out_dir) / name / 'log.txt'})", file=sys.stderr)
        if None not in records[number]:
            advance(number, records[number])

    not_started = iter(range(len(plans)))
    with bar, stack:
        if jobs == 1:  # one thread, as in a worker: rounding depends on it
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        try:
            while len(results) < len(plans):
                if ready:
                    number, place, call = ready.popleft()
                    receive(number, place, call())
                elif done := [future for future in submitted if future.done()]:
                    receive(*submitted.pop(done[0]), done[0].result())
                elif len(submitted) < jobs and (number := next(not_started, None)) is not None:
                    advance(number, None)
                else:
                    wait(submitted, return_when=FIRST_COMPLETED)
        except BrokenProcessPool:
            raise UserError(
                "A process was killed, perhaps for lack of memory; run the study again with fewer jobs to continue."
            ) from None
        bar.total = len(names)
    return [results[number] for number in range(len(plans))]


def run_cells(
    plans: Sequence[Plan[Cell]], out_dir: Path, measure: Callable[..., dict[str, Any]], *, jobs: int, expected: int
) -> Cell:
    """Return the trials of all cells, joined.

    Args:
        measure: As for `score_answers`. For the other arguments and the errors see `run_plans`.
    """
    score = functools.partial(score_answers, measure)
    results = run_plans(plans, out_dir, score, jobs=jobs, desc="training runs", expected=expected)
    return tuple([record for result in results for record in result[part]] for part in (0, 1))


def all_finished(records: list[Record]) -> list[Record]:
    """Return the records.

    Raises:
        UserError: A trial failed.
    """
    for record in records:
        if "error" in record:
            raise UserError(f"The trial {record['trial']['name']} failed: {record['error']}")
    return records


def choose(records: Iterable[Record], key: Callable[[Record], Any]) -> Record:
    """Return the record with the highest `key`, and among equal ones the lowest last validation loss.

    Raises:
        UserError: All trials failed.
    """
    records = list(records)
    done = [record for record in records if "error" not in record]
    if not done:
        raise UserError(f"All trials failed, the first with: {records[0]['error']}")
    return max(done, key=lambda record: (key(record), -record["summary"]["last_val_loss"]))


def at_edge(chosen: Record, records: Iterable[Record]) -> bool:
    """Return whether the chosen learning rate is the lowest or highest that was tried; a better one may lie beyond."""
    rates = [record["trial"]["settings"]["learning_rate"] for record in records]
    return chosen["trial"]["settings"]["learning_rate"] in (min(rates), max(rates))


def origin_of(
    script: str, settings: Any, known: dict[str, Sequence[str]], quick: dict[str, Any], records: list[Record]
) -> str:
    """Return how a study's trials were made, in one line: command, duration, seeds, and versions of PyTorch.

    The command has the flags that affect the results, without those that have default values. A resumed study may have
    trials of several versions.

    Args:
        script: Path of the script.
        settings: Its settings, as `complete` returns them with `known` and `quick`.
    """
    defaults = replace(complete(type(settings)(quick=settings.quick), known, quick), quick=False)
    flags = {n: v for n, v in asdict(settings).items() if n not in UNRECORDED and v != getattr(defaults, n)}
    command = shlex.join(["python", script, *as_flags(flags)])
    minutes = sum(record.get("seconds", 0) for record in records) / 60
    used = sorted({record["versions"]["torch"] for record in records})
    return (
        f"{command}: {len(records)} training runs, {minutes:.0f} minutes of one thread in all, seeds "
        f"{', '.join(map(str, settings.seeds))}, torch {' and '.join(used)}"
    )


def result_row(record: Record, names: Sequence[str], columns: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a trial as a line of a study's results.csv.

    Args:
        names: The columns of the parts of the trial's name, such as ("task", "method") for "facts-lora-...".
        columns: Further columns.
    """
    trial, summary = record["trial"], record.get("summary", {})
    return {
        **dict(zip(names, trial["name"].split("-"), strict=False)),
        "part": trial["scoring"]["part"],
        "learning_rate": trial["settings"]["learning_rate"],
        "seed": trial["settings"]["seed"],
        "parameters": summary.get("trainable_parameters"),
        "steps": summary.get("steps"),
        **(columns or {}),
        "val_loss": summary.get("last_val_loss"),
        "seconds": record.get("seconds"),
        "error": record.get("error", ""),
        **record.get("scores", {}),
    }


def complete(settings: S, known: dict[str, Sequence[str]], quick: dict[str, Any], words: Sequence[str] = ()) -> S:
    """Return the settings of a study with the values of --quick, all names for an empty list, and no value twice.

    Args:
        known: The names that each list of names may contain.
        quick: The values of --quick for settings that no flag sets and that have their default values.
        words: The words of the command line, whose flags keep their values.

    Raises:
        UserError: A name is unknown.
    """
    if settings.quick:
        given = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
        given |= {name for name, value in asdict(settings).items() if value != getattr(type(settings), name)}
        settings = replace(settings, **{name: value for name, value in quick.items() if name not in given})
    lists = {name: tuple(dict.fromkeys(v)) for name, v in asdict(settings).items() if isinstance(v, tuple)}
    for name, names in known.items():
        lists[name] = lists[name] or tuple(names)
        if not set(lists[name]) <= set(names):
            raise UserError(f"{name} is {' '.join(lists[name])}; it can be some of {', '.join(names)}.")
    return replace(settings, **lists)


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95% interval by Student's t; for a single value the half is nan."""
    from scipy.stats import t

    values = list(values)
    if len(values) == 1:
        return values[0], math.nan
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(half)
