"""Shared code of the evaluations: loading a model with or without an adapter, batched answers, an output folder.

An evaluation writes three files into its output folder:

    answers.jsonl   one record per question with the settings that produced it, appended batch by batch
    summary.json    scores, intervals, statistics of the answers, and settings
    summary.md      the same as a table

A stopped evaluation continues where it stopped when it is started again with the same settings.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from evaluate.settings import ModelSettings
from lit_llama import tables
from lit_llama.checkpoint import base_fingerprint, load_model, read_adapter, versions
from lit_llama.compose import load_adapted
from lit_llama.device import pick_device
from lit_llama.generation import Sampling, cut_at_stop, generate, remaining_context
from lit_llama.live_text import stop_test
from lit_llama.model import LLaMA
from lit_llama.prompts import ChatStyle, PromptStyle, get_prompt_style
from lit_llama.storage.files import LOCK, check_claim, claim, explained, locked, write_text
from lit_llama.storage.schema import check, parse_json, read_bytes, read_json
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, log

ANSWERS, SUMMARY, TABLE = "answers.jsonl", "summary.json", "summary.md"
REPORT = (SUMMARY, TABLE, "figure.png")  # of a comparison of two sides
JUDGED = ("pairs", "single", "unsafe")  # entries of a summary with the results of a judge
TEMPLATE_DATE = "template_date"  # in `made_by`: the day at which `stop_clock` stopped the clock
IDENTIFIED_OTHERWISE = {"versions", "base", "adapter"}  # may differ between the parts of a resumed evaluation


@dataclass
class EvaluatedModel:
    """A loaded model.

    Args:
        style: how an instruction becomes a prompt.
    """

    model: LLaMA
    tokenizer: Tokenizer
    style: PromptStyle


def load(settings: ModelSettings) -> EvaluatedModel:
    """Load a base model with or without an adapter.

    Raises:
        UserError: a file is missing or damaged, the adapter belongs to another base, or a setting is out of range.
    """
    style = pick_style(settings)
    device, dtype = pick_device(settings.accelerator, settings.precision)
    options = {"device": device, "dtype": dtype, "quantize": settings.quantize}
    if settings.adapter is None:
        model = load_model(settings.checkpoint_dir, **options)
    else:
        model = load_adapted(settings.checkpoint_dir, [read_adapter(settings.adapter)], (settings.strength,), **options)
    return EvaluatedModel(model, Tokenizer(settings.checkpoint_dir), style)


def pick_style(settings: ModelSettings) -> PromptStyle:
    """Return the prompt style of the settings, else the adapter's, else Alpaca's."""
    if settings.prompt_style is None and settings.adapter is not None:
        name = read_adapter(settings.adapter).meta.get("prompt_style") or "alpaca"
        return get_prompt_style(name, settings.checkpoint_dir)
    return get_prompt_style(settings.prompt_style or "alpaca", settings.checkpoint_dir)


def stop_clock(style: PromptStyle, *folders: Path, stated: str | None = None) -> tuple[PromptStyle, dict[str, str]]:
    """Stop the clock of a chat template that reads it, so that an evaluation renders the same prompts on another day.

    Args:
        folders: folders of earlier answers; the first date that one of these states is used, else today's.
        stated: a date that takes precedence.

    Returns:
        The style, and the date as an entry of `made_by`, which is empty if the template reads no clock.

    Raises:
        UserError: the answers in a folder are damaged, or the date is invalid.
    """
    if not isinstance(style, ChatStyle) or "strftime_now" not in style.chat.source:
        return style, {}
    first = [record for folder in folders for record in JsonLines(folder / ANSWERS).records[:1]]
    dates = [stated, *(record.get("made_by", {}).get(TEMPLATE_DATE) for record in first), date.today().isoformat()]
    day = next(filter(None, dates))
    try:
        return replace(style, chat=style.chat.at(date.fromisoformat(day))), {TEMPLATE_DATE: day}
    except (TypeError, ValueError):
        raise UserError(
            f"{day!r}, the {TEMPLATE_DATE} of earlier answers, is not a date; move these answers away and run again."
        ) from None


def identify(settings: ModelSettings) -> dict[str, Any]:
    """Return what identifies the model that the settings select, as JSON, without loading it.

    Raises:
        UserError: as `load`.
    """
    device, dtype = pick_device(settings.accelerator, settings.precision)
    return {
        "base": str(settings.checkpoint_dir),
        "base_tensors": base_fingerprint(settings.checkpoint_dir)["tensors"],
        **describe_adapter(settings),
        **pick_style(settings).about,
        "precision": str(dtype).removeprefix("torch."),
        "quantize": settings.quantize,
        "device": device.type,
        "versions": versions(),
    }


def describe_adapter(settings: ModelSettings) -> dict[str, Any]:
    """Return what identifies the adapter, as JSON; `{"adapter": None}` for a base model alone."""
    if settings.adapter is None:
        return {"adapter": None}
    adapter = read_adapter(settings.adapter)
    return {
        "adapter": str(adapter.path),
        "adapter_sha256": hashlib.sha256(adapter.path.read_bytes()).hexdigest(),
        "method": adapter.method,
        "adapter_config": adapter.config,
        "strength": settings.strength,
    }


# types of fields in answers.jsonl and judgements.jsonl
FIELDS: dict[str, Any] = {
    "id": int | str, "made_by": dict, "prompt": str, "answer": str, "tokens": int, "seconds": float, "ended": bool,
    "logps": dict, "predicted": str | None, "prompt_tokens": int,
    "key": str, "reply": str, "request": dict, "time": str, "endpoint": str, "model": str | None,
    "served_model": str | None, "finish_reason": str | None,
}  # fmt: skip
ANSWER_FIELDS = ("answer", "tokens", "ended", "seconds")  # of a record that `answer_questions` writes


class JsonLines:
    """A JSON Lines file that grows by complete records: a program that is killed loses at most the last one.

    Several processes may append to the same file.

    Args:
        path: the file, read if it exists. An incomplete last line is ignored, and removed by the next `append`.
        first: the first field of each record.

    Raises:
        UserError: another line is not a JSON object, a field in `FIELDS` has the wrong type, or an incomplete last line
            does not begin with `first`.
    """

    def __init__(self, path: Path, first: str = "id") -> None:
        self.path, self.start = Path(path), f'{{"{first}": '.encode()
        self.records: list[dict[str, Any]] = []
        content = read_bytes(self.path, limit=2**33) if self.path.exists() else b""
        self.end = len(content) - self.incomplete_length(content)  # where the complete lines end
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            source = f"{self.path}, line {number}"
            try:
                record = parse_json(line, source)
                for name in FIELDS.keys() & record.keys():
                    check(record[name], FIELDS[name], f"{source}: {name}")
            except UserError as error:
                raise UserError(f"{str(error).rstrip('.')}; move the file away and run again.") from None
            self.records.append(record)

    def incomplete_length(self, content: bytes) -> int:
        """Return the length of an incomplete last line.

        Raises:
            UserError: it does not begin like a record.
        """
        line = content[content.rfind(b"\n") + 1 :]
        if not line.startswith(self.start[: len(line)]):
            raise UserError(
                f"{self.path} ends with a line that this program did not write; move the file away and run again."
            )
        return len(line)

    def append(self, *records: dict[str, Any]) -> None:
        """Write records to the disk.

        Raises:
            UserError: the disk is full, the folder cannot be written to, or the last line is another program's.
        """
        lines = "".join(json.dumps(record) + "\n" for record in records)
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # never through a symbolic link
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            with (
                locked(self.path, wait=True),
                open(self.path, "ab+", opener=lambda path, _: os.open(path, flags, 0o666)) as file,
            ):
                file.seek(self.end)
                if incomplete := self.incomplete_length(file.read()):  # after the lines of other processes
                    file.truncate(os.fstat(file.fileno()).st_size - incomplete)
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
                self.end = os.fstat(file.fileno()).st_size
        self.records += records


class Results:
    """The output folder of one evaluation.

    Args:
        output_dir: the folder.
        made_by: the settings that determine an answer, as JSON; each record repeats them.
        overwrite: replace the results of other settings. Other files in the folder are never touched.

    Raises:
        UserError: the folder has results of other settings, or files of these names that no evaluation wrote, or
            another process is writing to it.
    """

    def __init__(self, output_dir: Path, made_by: dict[str, Any], overwrite: bool = False) -> None:
        self.output_dir = Path(output_dir)
        self.made_by = json.loads(json.dumps(made_by, default=str))
        self.overwrite = overwrite
        self.file = self._read()
        has_summary = self._has_summary()
        check_claim(self.output_dir, (SUMMARY, TABLE), adopt=has_summary)  # before anything is written
        claim(self.output_dir, (ANSWERS, LOCK), adopt=bool(self.file.records))
        claim(self.output_dir, (SUMMARY, TABLE), adopt=has_summary)
        self._lock = locked(self.output_dir / LOCK)  # held until this object or the process ends
        self._lock.__enter__()
        self.file = self._read()  # the process that had the lock may have written
        for record in self.file.records:
            if differing := self._differing(record["made_by"]):
                self._replace(differing)
                break
        check_report(self.output_dir, {"made_by": self.made_by}, overwrite, (SUMMARY, TABLE))
        self.by_id = {record["id"]: record for record in self.file.records}

    def _read(self) -> JsonLines:
        file = JsonLines(self.output_dir / ANSWERS)
        if any("made_by" not in record or "id" not in record for record in file.records):
            raise UserError(f"{file.path} was not written by an evaluation; choose another --output_dir.")
        return file

    def _has_summary(self) -> bool:
        """Return whether `finish` wrote the summary."""
        try:
            return "made_by" in read_json(self.output_dir / SUMMARY)
        except UserError:
            return False

    def _differing(self, made_by: dict[str, Any]) -> str:
        """Describe the first setting that differs from a record's; empty if none does."""
        if "base_weights" in made_by and "base_tensors" not in made_by:
            return "of an earlier version, which identified the base by a part of its weights"
        return difference(made_by, self.made_by)

    def _replace(self, reason: str) -> None:
        """Remove the results, if the user allows it.

        Raises:
            UserError: without `overwrite`.
        """
        remove_results(self.output_dir, reason, self.overwrite, (ANSWERS, SUMMARY, TABLE))
        self.file, self.by_id = JsonLines(self.output_dir / ANSWERS), {}

    def answered(self, prompts: dict[Any, str], fields: Collection[str] = ()) -> set[Any]:
        """Return the ids that have a complete record already.

        Args:
            prompts: the prompt of each id.
            fields: names of fields that a complete record has.

        Raises:
            UserError: a record answers another prompt.
        """
        done = prompts.keys() & self.by_id.keys()
        other = [id for id in done if self.by_id[id].get("prompt") != prompts[id]]
        if other:
            self._replace(f"of other questions (for example, question {other[0]} has another prompt)")
            return set()
        return {id for id in done if self.by_id[id].keys() >= set(fields)}

    def add(self, *records: dict[str, Any]) -> None:
        """Append records, each with its `id` and `prompt`, to the file."""
        records = [{**record, "made_by": self.made_by} for record in records]
        self.file.append(*records)
        self.by_id.update({record["id"]: record for record in records})

    def replace(self, records: Sequence[dict[str, Any]]) -> None:
        """Replace all records by these, each with its `id` and `prompt`.

        Raises:
            UserError: the disk is full, or the folder cannot be written to.
        """
        records = [{**record, "made_by": self.made_by} for record in records]
        write_text(self.output_dir / ANSWERS, "".join(json.dumps(record) + "\n" for record in records))
        self.file = self._read()
        self.by_id = {record["id"]: record for record in self.file.records}

    def finish(self, summary: dict[str, Any], table: str) -> dict[str, Any]:
        """Print the table, write `summary.json` and `summary.md`, and return the content of the first.

        Its `versions` are those that made the records: several, if the evaluation was resumed after an update.
        """
        print(table, end="")
        summary = {**summary, "versions": versions_of(self.by_id.values()), "made_by": self.made_by}
        write_text(self.output_dir / SUMMARY, json.dumps(summary, indent=2) + "\n")
        write_text(self.output_dir / TABLE, table.rstrip() + "\n")
        log(f"wrote {self.output_dir}")
        return summary


def difference(was: dict[str, Any], now: dict[str, Any]) -> str:
    """Describe the first entry that differs, except those in `IDENTIFIED_OTHERWISE`; empty if none does."""
    for name in sorted((was.keys() | now.keys()) - IDENTIFIED_OTHERWISE):
        if was.get(name) != now.get(name):
            return f"of other settings ({name} was {was.get(name)}, is now {now.get(name)})"
    return ""


def remove_results(output_dir: Path, reason: str, overwrite: bool, names: Iterable[str]) -> None:
    """Remove files with results from a folder, if the user allows it.

    Args:
        reason: how these results differ from the new ones.

    Raises:
        UserError: without `overwrite`.
    """
    if not overwrite:
        raise UserError(
            f"{output_dir} has results {reason}; choose another --output_dir, or replace them with --overwrite."
        )
    log(f"note: replacing the results {reason} in {output_dir}.")
    for name in names:
        (output_dir / name).unlink(missing_ok=True)


def check_report(output_dir: Path, report: dict[str, Any], overwrite: bool, names: Iterable[str] = REPORT) -> None:
    """Check, before work starts, that a folder has no summary of another benchmark, other sides or another judge.

    A summary without judgements may be replaced by one with them.

    Args:
        report: the fields of the new summary that `identify_report` reads.
        overwrite: remove such a summary and the other files in `names`.

    Raises:
        UserError: there is such a summary, and `overwrite` is False.
    """
    try:
        was = identify_report(read_json(output_dir / SUMMARY))
    except UserError:  # there is none, or it is damaged
        return
    now = identify_report(json.loads(json.dumps(report, default=str)))
    if "judge model" not in was:
        now = {name: value for name, value in now.items() if not name.startswith("judge ")}
    if "judge model" in was and "judge model" not in now:
        remove_results(output_dir, f"of the judge {was['judge model']}, and this run has no judge", overwrite, names)
    elif differing := difference(was, now):
        remove_results(output_dir, differing, overwrite, names)


def identify_report(summary: dict[str, Any]) -> dict[str, Any]:
    """Return what a summary is about: the benchmark and, in a comparison, both sides, the judge and the reviews."""
    about = {"benchmark": summary.get("benchmark") or summary.get("made_by", {}).get("benchmark")}
    for side in ("first", "second"):
        made_by = dict(summary.get(side, {}).get("made_by", {}))
        if "base_tensors" in made_by:
            made_by.pop("file", None)  # the answers of an evaluation, which may have been read again
        about |= {f"{side} {name}": made_by[name] for name in made_by.keys() - IDENTIFIED_OTHERWISE}
    if judge := summary.get("judge"):
        sent = {"model": judge.get("model"), "temperature": 0, "max_tokens": judge.get("max_tokens")}
        sent["reference_file"] = judge.get("reference_file")
        sent |= {**judge.get("body", {}), "results": [name for name in JUDGED if name in summary]}
        about |= {f"judge {name}": value for name, value in sent.items() if value is not None}
    if reviews := summary.get("reviews"):
        about["reviews"] = reviews["file"]
    return about


def versions_of(records: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the distinct versions that made records, in their order; records of other programs are ignored."""
    made = [record["made_by"] for record in records if isinstance(record.get("made_by"), dict)]
    distinct: list[dict[str, str]] = []
    for used in (made_by["versions"] for made_by in made if "versions" in made_by):
        if used not in distinct:
            distinct.append(used)
    return distinct


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Args:
        id: unique within the benchmark, an int or a str.
        prompt: the complete text that the model continues.
        details: further fields of the question's record.
        place: in the benchmark, which selects the seed of sampling (default: the place among the questions asked).
    """

    id: int | str
    prompt: str
    details: dict[str, Any] = field(default_factory=dict)
    place: int | None = None


def drop_long(
    evaluated: EvaluatedModel, questions: list[Question], lengths: list[int] | None = None, *, skip: bool
) -> list[Question]:
    """Return the questions whose prompts leave room for an answer in the model's context, and report the others.

    Args:
        lengths: tokens of each prompt (default: counted with the model's tokenizer).
        skip: drop prompts that are too long instead of raising an error.

    Raises:
        UserError: a prompt is too long and `skip` is False, or all are too long.
    """
    limit = evaluated.model.max_tokens - 1
    lengths = lengths or [len(evaluated.tokenizer.encode(question.prompt, bos=True)) for question in questions]
    fitting = [question for question, length in zip(questions, lengths, strict=True) if length <= limit]
    n_long = len(questions) - len(fitting)
    if n_long:
        text = f"{n_long} of {len(questions)} prompts are longer than {limit} tokens (the longest has {max(lengths)})"
        if not skip or not fitting:
            remedy = "" if skip else ", or skip them with --skip_long true"
            raise UserError(f"{text}; use a model with a longer context{remedy}.")
        log(f"note: {text}; they are skipped and not scored.")
    return fitting


def few_shot(style: PromptStyle, examples: Sequence[tuple[str, str]], question: str) -> str:
    """Return the prompt of a question, preceded by few-shot examples (question, answer) as earlier turns of the style.

    The style `plain` has no turns, so each question is followed by "Answer:" there.
    """
    if style.name == "plain":
        return "".join(f"{text}\nAnswer: {answer}\n\n" for text, answer in examples) + f"{question}\nAnswer:"
    turns = [(("user", text), ("assistant", answer)) for text, answer in examples]
    messages = [{"role": role, "content": text} for turn in turns for role, text in turn]
    return style.render_messages([*messages, {"role": "user", "content": question}])


def answer_questions(
    evaluated: EvaluatedModel,
    questions: list[Question],
    sampling: Sampling,
    results: Results,
    *,
    stop: tuple[str, ...],
    batch_size: int,
    desc: str = "Answering",
    score: Callable[[dict[str, Any]], dict[str, Any]] = lambda record: {},
) -> list[dict[str, Any]]:
    """Answer the questions that have no record yet, longest prompts first, and return the records of all.

    Args:
        stop: texts that end an answer.
        score: returns further fields of a record.

    A record has `id`, `prompt`, the question's details, `answer` (text before the first stop text, stripped),
    `tokens` (of the answer), `ended` (by the model, not by a limit), `seconds` (the batch's time over its rows) and
    `made_by`.
    """
    encode = evaluated.tokenizer.encode
    prompts = {question.id: question.prompt for question in questions}
    done = results.answered(prompts, ANSWER_FIELDS)
    by_place = {i if q.place is None else q.place: q for i, q in enumerate(questions)}
    encoded = {i: encode(q.prompt, bos=True) for i, q in by_place.items() if q.id not in done}
    with tqdm(total=len(questions), initial=len(done), desc=desc, unit="question") as bar:
        for answers in answer_batches(evaluated, encoded, sampling, stop, batch_size):
            records = [
                {"id": q.id, "prompt": q.prompt, **q.details, **answer, "answer": answer["answer"].strip()}
                for q, answer in ((by_place[i], answer) for i, answer in answers.items())
            ]
            results.add(*({**record, **score(record)} for record in records))
            bar.update(len(answers))
    # an earlier version may have scored a record differently
    records = [{**results.by_id[question.id], **question.details} for question in questions]
    return [{**record, **score(record)} for record in records]


def answer_batches(
    evaluated: EvaluatedModel, encoded: dict[int, list[int]], sampling: Sampling, stop: tuple[str, ...], batch_size: int
) -> Iterator[dict[int, dict[str, Any]]]:
    """Answer prompts given as token ids, longest first, and yield the answers of each batch.

    The numbers of the prompts determine the seeds of sampling. An answer has the fields that `answer_questions`
    describes, but its text is not stripped.
    """
    model, tokenizer = evaluated.model, evaluated.tokenizer
    finished = stop_test(tokenizer, stop)
    order = sorted(encoded, key=lambda i: -len(encoded[i]))  # so that a batch too large for memory fails at once
    for start in range(0, len(order), batch_size):
        rows, began, answers = order[start : start + batch_size], time.perf_counter(), {}
        new = generate(model, [encoded[i] for i in rows], sampling, tokenizer.stop_ids, finished, rows)
        seconds = round((time.perf_counter() - began) / len(rows), 4)
        for i, ids in zip(rows, new, strict=True):
            text, stopped = cut_at_stop(tokenizer.decode(ids), stop)
            # the ids exclude the stop token, so an answer that ends with one is shorter than the limit
            ended = stopped or len(ids) < min(sampling.max_new_tokens, remaining_context(model, encoded[i]))
            answers[i] = {"answer": text, "tokens": len(ids), "ended": ended, "seconds": seconds}
        yield answers


def answer_statistics(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the share of answers that ended by themselves, their mean length in tokens, and tokens per second."""
    tokens, seconds = sum(r["tokens"] for r in records), sum(r["seconds"] for r in records)
    return {
        "ended_share": sum(r["ended"] for r in records) / len(records),
        "mean_tokens": tokens / len(records),
        "tokens_per_second": tokens / max(seconds, 1e-9),
    }


def wilson_interval(outcomes: Sequence[bool]) -> tuple[float, float]:
    """Return Wilson's 95% interval of the share of outcomes that are true, also if all or none are."""
    from scipy.stats import binomtest

    interval = binomtest(sum(outcomes), len(outcomes)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of the mean of `values`, resampled with replacement.

    For a share, use `wilson_interval`: if all values are equal, this interval has no width.

    Only how often each distinct value is drawn matters, so the counts are drawn from a multinomial distribution.
    """
    distinct, counts = np.unique(np.asarray(values, float), return_counts=True)
    drawn = np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), size=10_000)
    low, high = np.quantile(drawn @ distinct / counts.sum(), [0.025, 0.975])
    return float(low), float(high)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table with a final line break."""
    return tables.markdown_table(header, rows) + "\n"
