"""Prepared datasets: written once by a prepare script, memory-mapped in training.

A folder holds Arrow files (`datasets` reads them without loading them) and `meta.json`, which says what made it. A
row of an SFT dataset is

    input_ids        prompt and response, one EOS at the end
    prompt_length    how many of them are the prompt's; `mask_prompt` in meta.json says whether those are trained on

and a row of a preference dataset has

    prompt, chosen, rejected        both responses follow the same prompt; EOS at the end of each that was not cut

so a training script never guesses a format, a template or a mask from a path.
"""

import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from datasets import Dataset, DatasetDict, disable_progress_bars, enable_progress_bars, load_dataset, load_from_disk

from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, atomic_write, log, unwritable

IGNORE_INDEX = -1  # label of a position that is not trained on
SFT_FORMAT = "lit-llama-sft-1"
PREFERENCE_FORMAT = "lit-llama-preference-1"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON list, a JSON-lines or a parquet file, optionally gzipped.

    Raises:
        UserError: no such file, not such a file, or a line that is not JSON (with its number).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no data file at {path}.")
    if path.suffix == ".parquet":
        try:
            return pa.parquet.read_table(path).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} is not a parquet file ({error}).") from None
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read as text ({error}).") from None
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON: {error.msg} in line {error.lineno}.") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        try:
            if line.strip():
                rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number} is not JSON: {error.msg}; the file should hold one JSON list, or one "
                "object per line."
            ) from None
    return rows


def download_rows(repo_id: str, split: str = "train", revision: str | None = None) -> Iterable[dict[str, Any]]:
    """The rows of a dataset on the Hugging Face hub, cached by `datasets`.

    Raises:
        UserError: it cannot be had.
    """
    enable_progress_bars()
    try:
        return load_dataset(repo_id, split=split, revision=revision)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"Cannot download {repo_id} ({reason}); check the network, or give the rows with --data_file."
        ) from None


def text_field(row: Any, number: int, name: str, default: str | None = None) -> str:
    """The text under `name` in row `number` (counted from 1); `default` where there is none, or null.

    Raises:
        UserError: the row is no object, lacks the field, or holds something else than text there.
    """
    if not isinstance(row, dict):
        raise UserError(f"Row {number} is not an object with named fields but {type(row).__name__}.")
    if name not in row and default is None:
        raise UserError(f"Row {number} has no field {name!r}; it has {', '.join(map(repr, row)) or 'none'}.")
    value = row.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise UserError(f"Row {number}: {name!r} is not text but {'null' if value is None else type(value).__name__}.")
    return value


def prepare_sft(
    rows: Iterable[dict[str, Any]],
    prepare_sample: Callable[[dict[str, Any], int], tuple[str, str]],
    *,
    output_dir: Path,
    tokenizer: Tokenizer,
    max_seq_length: int,
    mask_prompt: bool,
    eos_when_cut: bool = True,
    test_fraction: float,
    seed: int,
    num_proc: int,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Tokenizes (prompt, response) pairs and writes the dataset folder; reports what was dropped or cut.

    Args:
        rows: raw rows of the source.
        prepare_sample: (row, its number from 1) -> (prompt, response); raises UserError for a bad row.
        max_seq_length: tokens; longer responses are cut, longer prompts drop the row.
        mask_prompt: train on the response only.
        eos_when_cut: a response that was cut ends with EOS all the same.
        test_fraction: share of the rows held out for validation, above 0 and below 1; at least one row. Rows with the
            same prompt stay together.
        num_proc: processes that tokenize.
        about: what the folder should say of itself beyond that (source, prompt style).

    Returns:
        The content of `meta.json`.

    Raises:
        UserError: a setting out of range, a bad row, or no row left.
    """
    _check_split(test_fraction, seed)
    samples = [prepare_sample(row, number) for number, row in enumerate(rows, 1)]
    pairs = [(prompt, response) for prompt, response in samples if prompt.strip() and response.strip()]
    counts = Counter(rows=len(samples), empty=len(samples) - len(pairs))
    _check_count(len(pairs), counts, max_seq_length)

    def encode(prompt: str, response: str) -> dict[str, Any]:
        prompt_ids = tokenizer.encode(prompt, bos=True)
        whole = prompt_ids + tokenizer.encode(response, eos=True)
        ids = whole[:max_seq_length]
        if len(whole) > max_seq_length and eos_when_cut:
            ids[-1] = whole[-1]
        return {
            "input_ids": ids,
            "prompt_length": len(prompt_ids),
            "fits": len(prompt_ids) <= max_seq_length - 2,  # one token of response and EOS
            "cut": len(whole) > max_seq_length,
        }

    key = [pairs, tokenizer.sha256, max_seq_length, eos_when_cut]
    encoded = _tokenize(pairs, encode, key, num_proc, Path(output_dir).parent / ".cache")

    keep = np.flatnonzero(encoded["fits"])
    kept = encoded.select(keep)
    counts["too_long"] = len(encoded) - len(kept)
    counts["cut"] = int(np.sum(kept["cut"]))
    settings = {"max_seq_length": max_seq_length, "mask_prompt": mask_prompt, "tokenizer_sha256": tokenizer.sha256}
    meta = _write_splits(
        kept.select_columns(["input_ids", "prompt_length"]),
        [pairs[i][0] for i in keep],
        counts,
        output_dir=output_dir,
        test_fraction=test_fraction,
        seed=seed,
        about={"format": SFT_FORMAT, **about, **settings},
    )
    counts = meta["counts"]
    log(
        f"{counts['rows']} rows: {counts['empty']} empty and {counts['too_long']} with too long a prompt dropped, "
        f"{counts['cut']} responses cut to {max_seq_length} tokens; {counts['train']} for training, {counts['test']} "
        "for validation."
    )
    return meta


def prepare_preferences(
    rows: Iterable[Any],
    prepare_sample: Callable[[Any, int], tuple[str, str, str]],
    *,
    output_dir: Path,
    tokenizer: Tokenizer,
    max_seq_length: int,
    test_fraction: float,
    seed: int,
    num_proc: int,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Tokenizes (prompt, chosen, rejected) and writes the dataset folder; reports what was dropped or cut.

    Args:
        rows: raw rows of the source.
        prepare_sample: (row, its number from 1) -> (prompt, chosen, rejected); raises UserError for a bad row.
        max_seq_length: tokens of the prompt and one response; longer responses are cut and lose their EOS, longer
            prompts drop the pair.
        test_fraction, num_proc, seed, about: as in `prepare_sft`.

    Returns:
        The content of `meta.json`.

    Raises:
        UserError: a setting out of range, a bad row, or fewer than two pairs left.
    """
    _check_split(test_fraction, seed)
    samples = [prepare_sample(row, number) for number, row in enumerate(rows, 1)]
    pairs = [texts for texts in samples if all(text.strip() for text in texts)]
    counts = Counter(rows=len(samples), empty=len(samples) - len(pairs))
    _check_count(len(pairs), counts, max_seq_length)

    def encode(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
        prompt_ids = tokenizer.encode(prompt, bos=True)
        room = max(0, max_seq_length - len(prompt_ids))
        whole = [tokenizer.encode(text, eos=True) for text in (chosen, rejected)]
        cut = [ids[:room] for ids in whole]
        return {
            "prompt": prompt_ids,
            "chosen": cut[0],
            "rejected": cut[1],
            "fits": room > 0,
            "same": cut[0] == cut[1],
            "cut": sum(len(ids) > room for ids in whole),
        }

    key = [pairs, tokenizer.sha256, max_seq_length]
    encoded = _tokenize(pairs, encode, key, num_proc, Path(output_dir).parent / ".cache")

    fits, same = np.array(encoded["fits"], bool), np.array(encoded["same"], bool)
    keep = np.flatnonzero(fits & ~same)
    kept = encoded.select(keep)
    counts["too_long"] = int(np.sum(~fits))
    counts["identical"] = int(np.sum(fits & same))
    counts["cut"] = int(np.sum(kept["cut"]))
    settings = {"max_seq_length": max_seq_length, "tokenizer_sha256": tokenizer.sha256}
    meta = _write_splits(
        kept.select_columns(["prompt", "chosen", "rejected"]),
        [pairs[i][0] for i in keep],
        counts,
        output_dir=output_dir,
        test_fraction=test_fraction,
        seed=seed,
        about={"format": PREFERENCE_FORMAT, **about, **settings},
    )
    counts = meta["counts"]
    log(
        f"{counts['rows']} pairs: {counts['empty']} with an empty side, {counts['too_long']} with too long a prompt "
        f"and {counts['identical']} with two equal responses dropped, {counts['cut']} responses cut to "
        f"{max_seq_length} tokens; {counts['train']} for training, {counts['test']} for validation."
    )
    return meta


def _check_count(n: int, counts: Counter, max_seq_length: int) -> None:
    """Raises: UserError: n rows are too few for two splits; the counts say what became of the others."""
    if n < 2:
        equal = f", {counts['identical']} with equal responses" if counts["identical"] else ""
        raise UserError(
            f"Of {counts['rows']} rows {n} can be used ({counts['empty']} empty, {counts['too_long']} with a "
            f"prompt that fills all {max_seq_length} tokens{equal}); a dataset needs at least 2."
        )


def _check_split(test_fraction: float, seed: int) -> None:
    if not 0 < test_fraction < 1 or seed < 0:
        raise UserError(
            f"test_fraction is {test_fraction} and seed {seed}; they must be above 0 and below 1, and 0 or more."
        )


def _write_splits(
    kept: Dataset,
    prompts: list[str],
    counts: Counter,
    *,
    output_dir: Path,
    test_fraction: float,
    seed: int,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Splits the rows at random, those of one prompt together, writes the folder and returns its `meta.json`.

    Raises:
        UserError: fewer than two rows or prompts.
    """
    _check_count(len(kept), counts, about["max_seq_length"])
    in_test = held_out(prompts, test_fraction, seed)
    splits = {"train": kept.select(np.flatnonzero(~in_test)), "test": kept.select(np.flatnonzero(in_test))}
    counts = {**counts, "prompts": len(set(prompts)), **{name: len(rows) for name, rows in splits.items()}}
    meta = {**about, "counts": counts, "test_fraction": test_fraction, "seed": seed}
    write_dataset(output_dir, splits, meta)
    return meta


def held_out(prompts: list[Hashable], test_fraction: float, seed: int) -> np.ndarray:
    """Which rows are for validation, (rows,) bool: those of prompts drawn at random until the share is reached."""
    numbers: dict[Hashable, int] = {}
    prompt = np.array([numbers.setdefault(text, len(numbers)) for text in prompts])
    if len(numbers) < 2:
        raise UserError(f"All {len(prompts)} rows have the same prompt; two splits need at least 2.")
    order = np.random.default_rng(seed).permutation(len(prompts))
    drawn = np.array(list(dict.fromkeys(prompt[order])))  # the prompts in random order
    rows = np.cumsum(np.bincount(prompt)[drawn])
    count = 1 + np.searchsorted(rows, max(1, round(test_fraction * len(prompts))))
    return np.isin(prompt, drawn[: min(count, len(numbers) - 1)])


def _tokenize(
    texts: list[tuple[str, ...]], encode: Callable[..., dict[str, Any]], key: list, num_proc: int, cache_dir: Path
) -> Dataset:
    """`encode(*texts)` of every row as a dataset; cached under the hash of `key`, which is all the work depends on."""

    def encode_batch(batch: dict[str, list[str]]) -> dict[str, list]:
        rows = [encode(*row) for row in zip(*(batch[name] for name in names), strict=True)]
        return {name: [row[name] for row in rows] for name in rows[0]}

    names = [f"text {i}" for i in range(len(texts[0]))]
    key = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    cache_dir = cache_dir / f"tokenized-{key}"
    dataset = Dataset.from_dict({name: [row[i] for row in texts] for i, name in enumerate(names)})
    enable_progress_bars()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        return dataset.map(
            encode_batch,
            batched=True,
            remove_columns=names,
            num_proc=num_proc if len(dataset) >= 1000 * num_proc > 1000 else None,
            cache_file_name=str(cache_dir / "rows.arrow"),
            new_fingerprint=key,
            desc="Tokenizing",
        )
    except OSError as error:
        shutil.rmtree(cache_dir, ignore_errors=True)
        raise unwritable(cache_dir, error) or error from None
    finally:
        disable_progress_bars()


def write_dataset(output_dir: Path, splits: dict[str, Dataset], meta: dict[str, Any]) -> None:
    """Writes a whole dataset folder or nothing."""
    with atomic_write(output_dir, marker="meta.json") as folder:
        DatasetDict(splits).save_to_disk(str(folder))
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def read_meta(data_dir: Path, format: str) -> dict[str, Any]:
    """What a prepared folder says of itself.

    Raises:
        UserError: there is no prepared folder, or it is of another format.
    """
    path = Path(data_dir) / "meta.json"
    if not path.is_file():
        raise UserError(f"There is no prepared dataset at {data_dir}; write one with a script of scripts/prepare_*.py.")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); prepare the dataset again.") from None
    if meta.get("format") != format:
        raise UserError(f"{data_dir} is a dataset of format {meta.get('format')!r}; this script reads {format!r}.")
    return meta


class Split:
    """One split of a prepared folder: its rows as numpy arrays, and its `meta`.

    Args:
        data_dir: the prepared folder.
        split: "train" or "test".
        tokenizer: if given, the folder must have been made with it.
        max_rows: use the first rows only.

    Raises:
        UserError: not such a folder, or made with another tokenizer.
    """

    format: str  # what meta.json must say

    def __init__(self, data_dir: Path, split: str, tokenizer: Tokenizer | None = None, max_rows: int | None = None):
        self.meta = read_meta(data_dir, self.format)
        if tokenizer is not None and tokenizer.sha256 != self.meta["tokenizer_sha256"]:
            raise UserError(
                f"{data_dir} was tokenized with another tokenizer than {tokenizer.path}; prepare it again with this "
                "base model's --checkpoint_dir."
            )
        try:
            rows = load_from_disk(str(Path(data_dir) / split))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"The {split} rows of {data_dir} are missing or damaged ({error}).") from None
        self.rows = rows if max_rows is None else rows.select(range(min(max_rows, len(rows))))
        self.rows.set_format("numpy")

    def __len__(self) -> int:
        return len(self.rows)


class SFTData(Split):
    """One split of a prepared SFT folder, as the training loop wants it (`lit_llama.train.Task`)."""

    format = SFT_FORMAT

    def __init__(self, data_dir: Path, split: str, tokenizer: Tokenizer | None = None, max_rows: int | None = None):
        super().__init__(data_dir, split, tokenizer, max_rows)
        self.lengths = np.array([len(ids) for ids in self.rows["input_ids"]])
        self.n_masked = np.asarray(self.rows["prompt_length"]) * self.meta["mask_prompt"]
        self.weights = self.lengths - np.maximum(1, self.n_masked)  # nothing predicts the first token
        self.tokens = self.lengths

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """idx and labels, (B, T) int64, padded on the right to the longest row."""
        ids = [torch.from_numpy(row).long() for row in self.rows[indices]["input_ids"]]
        labels = [row.clone() for row in ids]
        for row, n_masked in zip(labels, self.n_masked[indices], strict=True):
            row[:n_masked] = IGNORE_INDEX
        pad = torch.nn.utils.rnn.pad_sequence
        return {"idx": pad(ids, batch_first=True), "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX)}

    def prompts(self, count: int) -> list[tuple[list[int], list[int]]]:
        """The first rows as (prompt, response) token ids."""
        rows = self.rows[:count]
        pairs = zip(rows["input_ids"], rows["prompt_length"], strict=True)
        return [(ids[:n].tolist(), ids[n:].tolist()) for ids, n in pairs]

    def losses(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The negative log-likelihood of the labels, summed over them, in nats."""
        return {"loss": -model(batch["idx"], labels=batch["labels"]).sum()}


def plan_epoch(
    lengths: np.ndarray, batch_size: int, micro_batch_size: int, seed: int, epoch: int
) -> list[list[np.ndarray]]:
    """Every row once, in random order, in micro-batches of rows of similar length.

    Rows are shuffled, sorted by length within groups of 16 batches, cut into micro-batches, and those shuffled again
    within their group. A pure function of its arguments, so that a resumed run sees the same batches.

    Returns:
        One list of micro-batches (row numbers) per optimiser step; the last step and its last micro-batch may be
        smaller.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    steps: list[list[np.ndarray]] = []
    for group in np.split(order, range(16 * batch_size, len(order), 16 * batch_size)):
        group = group[np.argsort(lengths[group], kind="stable")]
        full = len(group) // batch_size * batch_size
        # what does not fill a step is drawn at random, so that the short step is no special one
        rest = np.sort(rng.choice(len(group), len(group) - full, replace=False))
        short, group = group[rest], np.delete(group, rest)
        micro = np.array_split(group, range(micro_batch_size, len(group), micro_batch_size)) if full else []
        micro = [micro[i] for i in rng.permutation(len(micro))]
        per_step = batch_size // micro_batch_size
        steps += [micro[i : i + per_step] for i in range(0, len(micro), per_step)]
        if len(short):
            steps.append(np.array_split(short, range(micro_batch_size, len(short), micro_batch_size)))
    return steps


def plan_fixed_epoch(
    lengths: np.ndarray, batch_size: int, micro_batch_size: int, seed: int, epoch: int
) -> list[list[np.ndarray]]:
    """As `plan_epoch`, but the micro-batches are the same in every epoch and for every seed; their order is random.

    What is computed once per row in such a micro-batch (a reference's log-probabilities) is then rounded exactly as
    it will be in training.
    """
    fixed = [micro for step in plan_epoch(lengths, batch_size, micro_batch_size, 0, 0) for micro in step]
    order = np.random.default_rng((seed, epoch)).permutation(len(fixed))
    per_step = batch_size // micro_batch_size
    return [[fixed[i] for i in order[start : start + per_step]] for start in range(0, len(order), per_step)]


def default_num_proc() -> int:
    return min(8, os.cpu_count() or 1)
