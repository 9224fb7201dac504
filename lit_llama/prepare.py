"""Write prepared datasets: tokenize rows, split them, and save a folder that `lit_llama.data` reads."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets, disable_progress_bars, enable_progress_bars
from tqdm import tqdm

from lit_llama.config import CONFIG_NAME, LLaMAConfig
from lit_llama.console import signals_to_first_process
from lit_llama.data import PREFERENCE_FORMAT, SFT_FORMAT, hash_chat_tokens
from lit_llama.prompts import PromptStyle
from lit_llama.storage.cache import cache_folder, fill_once
from lit_llama.storage.files import atomic_folder, check_folder, write_text
from lit_llama.storage.manifest import DATASET, MANIFEST, make_manifest
from lit_llama.storage.rows import naming
from lit_llama.storage.schema import read_json
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, log

EARLIER_FILES = re.compile(
    r"meta\.json|dataset_dict\.json|(train|test)/(state\.json|dataset_info\.json|data-\d{5}-of-\d{5}\.arrow)"
)


def render_prompt(style: PromptStyle, text: str, input: str = "") -> str:
    """Return the prompt in a style. An empty text gives an empty prompt, so that its row is dropped."""
    return style.render(text, input) if text.strip() else ""


def prepare_sft(
    rows: Iterable[Any],
    prepare_sample: Callable[[Any, int], tuple[str, str]],
    *,
    tokenizer: Tokenizer,
    max_seq_length: int,
    mask_prompt: bool,
    eos_when_cut: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Write a dataset for supervised finetuning. For `rows`, `options` and the result see `prepare_dataset`.

    Args:
        prepare_sample: Function of a row and its number, counted from 1, that returns (prompt, response). It raises
            `UserError` for an invalid row.
        max_seq_length: Maximum length of prompt and response, in tokens. Longer responses are truncated; a row whose
            prompt leaves no room for a response is dropped.
        mask_prompt: Train on the responses only.
        eos_when_cut: Replace the last token of a truncated response with EOS.
    """

    def encode(prompt: str, response: str) -> dict[str, Any]:
        prompt_ids = tokenizer.encode(prompt, bos=True)
        full = prompt_ids + tokenizer.encode_response(prompt, response)
        ids = full[:max_seq_length]
        if eos_when_cut:
            ids[-1] = full[-1]
        fits = len(prompt_ids) <= max_seq_length - 2  # one token of the response, and EOS
        return {
            "input_ids": ids,
            "prompt_length": len(prompt_ids),
            "dropped": "" if fits else "too_long",
            "cut": int(len(full) > max_seq_length),
        }

    return prepare_dataset(
        rows,
        prepare_sample,
        encode,
        drops=("too_long",),
        key=[SFT_FORMAT, max_seq_length, eos_when_cut],
        tokenizer=tokenizer,
        settings={"format": SFT_FORMAT, "max_seq_length": max_seq_length, "mask_prompt": mask_prompt},
        **options,
    )


def prepare_preferences(
    rows: Iterable[Any],
    prepare_sample: Callable[[Any, int], tuple[str, str, str]],
    *,
    tokenizer: Tokenizer,
    max_seq_length: int,
    **options: Any,
) -> dict[str, Any]:
    """Write a dataset of preference pairs. For `rows`, `options` and the result see `prepare_dataset`.

    Args:
        prepare_sample: Function of a row and its number, counted from 1, that returns (prompt, chosen, rejected). It
            raises `UserError` for an invalid row.
        max_seq_length: Maximum length of the prompt and one response, in tokens. Longer responses are truncated and
            lose their EOS; a pair whose prompt leaves no room for a response is dropped.
    """

    def encode(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
        prompt_ids = tokenizer.encode(prompt, bos=True)
        space = max(0, max_seq_length - len(prompt_ids))
        full = [tokenizer.encode_response(prompt, text) for text in (chosen, rejected)]
        chosen_ids, rejected_ids = (ids[:space] for ids in full)
        return {
            "prompt": prompt_ids,
            # arrays: a batch of empty lists would have another type
            "chosen": np.array(chosen_ids, np.int64),
            "rejected": np.array(rejected_ids, np.int64),
            "dropped": "too_long" if space == 0 else "identical" if chosen_ids == rejected_ids else "",
            "cut": sum(len(ids) > space for ids in full),
        }

    return prepare_dataset(
        rows,
        prepare_sample,
        encode,
        drops=("too_long", "identical"),
        key=[PREFERENCE_FORMAT, max_seq_length],
        tokenizer=tokenizer,
        settings={"format": PREFERENCE_FORMAT, "max_seq_length": max_seq_length},
        **options,
    )


def prepare_dataset(
    rows: Iterable[Any],
    prepare_sample: Callable[[Any, int], tuple[str, ...]],
    encode: Callable[..., dict[str, Any]],
    *,
    drops: tuple[str, ...],
    key: list[Any],
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    output_dir: Path,
    test_fraction: float,
    seed: int,
    num_proc: int,
    about: dict[str, Any],
    split_by: Literal["draw", "hash"] | Collection[str] = "draw",
) -> dict[str, Any]:
    """Tokenize texts, split the rows, write the dataset folder and log what was dropped or truncated.

    Args:
        rows: Rows of the source.
        prepare_sample: Function of a row and its number, counted from 1, that returns its texts, the prompt first.
            Rows with an empty text are dropped.
        encode: Function of a row's texts that returns its columns, `dropped` (a reason from `drops`, or "") and `cut`
            (the number of truncated responses; of a conversation, 1 if it is shortened).
        key: Everything that `encode` depends on besides the texts and the tokenizer; it identifies cached results.
        settings: Further entries of `meta.json`, including `format` and `max_seq_length`.
        output_dir: Folder to write.
        test_fraction: Share of the rows held out for validation, between 0 and 1. Rows with the same prompt stay
            together, and each split gets at least one prompt.
        seed: Seed of the split.
        num_proc: Number of processes for tokenization.
        about: Entries of `meta.json` that describe the data, such as its source and prompt style.
        split_by: "draw" holds out exactly the share. With "hash", whether a prompt is held out depends only on the
            prompt, the share and the seed, so datasets for SFT and DPO from one source hold out the same prompts. If
            this is a collection of prompts, exactly these are held out.

    Returns:
        The content of `meta.json`.

    Raises:
        UserError: A row is invalid, or fewer than two rows or prompts remain.
    """
    max_seq_length = settings["max_seq_length"]
    adopt_dataset(output_dir)
    check_folder(output_dir, DATASET, tokenizer.path)
    with naming(about.get("source", "data")):
        bar = tqdm(rows, desc="Rendering", unit=" rows", delay=1)
        samples = [prepare_sample(row, number) for number, row in enumerate(bar, 1)]
    texts = [sample for sample in samples if all(text.strip() for text in sample)]
    counts = {"rows": len(samples), "empty": len(samples) - len(texts), **dict.fromkeys(drops, 0)}
    _check_count(len(texts), counts, max_seq_length)

    chat_tokens = hash_chat_tokens(tokenizer)
    depends_on = [*key, tokenizer.identity, chat_tokens, texts]
    encoded = _tokenize(texts, encode, depends_on, num_proc, cache_folder(output_dir))
    reasons = np.array(encoded["dropped"][:])
    counts |= {reason: int(np.sum(reasons == reason)) for reason in drops}
    keep = np.flatnonzero(reasons == "")
    _check_count(len(keep), counts, max_seq_length)

    kept, prompts = encoded.select(keep), [getattr(texts[i][0], "first", texts[i][0]) for i in keep]
    if isinstance(split_by, str):
        in_test = (held_out_by_hash if split_by == "hash" else held_out)(prompts, test_fraction, seed)
    else:
        in_test, split_by = np.isin(prompts, list(split_by)), "given"
    columns = kept.remove_columns(["dropped", "cut"])
    splits = {"train": columns.select(np.flatnonzero(~in_test)), "test": columns.select(np.flatnonzero(in_test))}
    counts |= {"cut": int(np.sum(kept["cut"][:])), "prompts": len(set(prompts))}
    counts |= {name: len(split) for name, split in splits.items()}
    meta = {**settings, **about, **tokenizer.identity, "counts": counts}
    meta |= {"test_fraction": test_fraction, "seed": seed, "split_by": split_by}
    if "chat_template_sha256" in about:
        meta["chat_tokens_sha256"] = chat_tokens
    write_dataset(output_dir, splits, meta)
    cut = "conversations shortened" if settings.get("multi_turn") else "responses truncated"
    log(
        f"{counts['rows']} rows. Dropped: {_describe_drops(counts)}. {counts['cut']} {cut} to "
        f"{max_seq_length} tokens. {counts['train']} rows for training, {counts['test']} for validation."
    )
    if counts["cut"] and (path := tokenizer.path.parent / CONFIG_NAME).is_file():
        context = LLaMAConfig.from_json(path).block_size
        if context < max_seq_length:
            log(f"note: the context of {path.parent} is {context} tokens, and training refuses longer rows; set "
                f"--max_seq_length {context}.")  # fmt: skip
    return meta


def _check_count(n: int, counts: dict[str, int], max_seq_length: int) -> None:
    """Raise `UserError` if n rows are too few for two splits."""
    if n < 2:
        raise UserError(
            f"{n} of {counts['rows']} rows can be used, and a dataset needs at least 2. Dropped: "
            f"{_describe_drops(counts)} (max_seq_length is {max_seq_length})."
        )


def _describe_drops(counts: dict[str, int]) -> str:
    phrases = {"empty": "with an empty text", "too_long": "with too long a prompt", "identical": "with equal responses"}
    return ", ".join(f"{counts[name]} {phrase}" for name, phrase in phrases.items() if name in counts)


def held_out(prompts: Sequence[Hashable], test_fraction: float, seed: int) -> np.ndarray:
    """Return a mask of the validation rows, (rows,) bool: prompts are drawn until the share is reached.

    Raises:
        UserError: All prompts are equal.
    """
    _check_prompts(prompts)
    numbers: dict[Hashable, int] = {}
    prompt = np.array([numbers.setdefault(text, len(numbers)) for text in prompts])
    order = np.random.default_rng(seed).permutation(len(prompts))
    drawn = np.array(list(dict.fromkeys(prompt[order])))  # the prompts in random order
    rows = np.cumsum(np.bincount(prompt)[drawn])
    count = 1 + np.searchsorted(rows, max(1, round(test_fraction * len(prompts))))
    return np.isin(prompt, drawn[: min(count, len(numbers) - 1)])


def held_out_by_hash(prompts: Sequence[str], test_fraction: float, seed: int) -> np.ndarray:
    """Return a mask of the validation rows, (rows,) bool: those whose prompt has a hash below the share.

    It does not depend on the other rows, except that each split gets at least one prompt.

    Raises:
        UserError: All prompts are equal.
    """
    _check_prompts(prompts)
    digests = (hashlib.sha256(f"{seed} {prompt}".encode()).digest() for prompt in prompts)
    hashes = np.array([int.from_bytes(digest[:8], "big") / 2**64 for digest in digests])
    distinct = np.unique(hashes)
    return hashes < np.clip(test_fraction, distinct[1], distinct[-1])


def _check_prompts(prompts: Sequence[Hashable]) -> None:
    if len(set(prompts)) < 2:
        raise UserError(f"All {len(prompts)} rows have the same prompt; two splits need at least 2.")


def _tokenize(
    texts: list[tuple[str, ...]], encode: Callable[..., dict[str, Any]], key: list, num_proc: int, cache_dir: Path
) -> Dataset:
    """Return `encode(*texts)` of every row; results are cached under the hash of `key`."""

    def encode_batch(batch: dict[str, list[str]]) -> dict[str, list]:
        if os.getpid() != first_process and parents.setdefault(os.getpid(), os.getppid()) != os.getppid():
            os._exit(1)  # the first process was killed
        columns = (map(kind, batch[name]) for name, kind in zip(names, kinds, strict=True))  # Arrow returns plain str
        rows = [encode(*row) for row in zip(*columns, strict=True)]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def fill(folder: Path) -> None:
        enable_progress_bars()
        try:
            with signals_to_first_process():
                dataset.map(
                    encode_batch,
                    batched=True,
                    remove_columns=names,
                    num_proc=num_proc if len(dataset) >= 1000 * num_proc > 1000 else None,
                    cache_file_name=str(folder / "rows.arrow"),
                    new_fingerprint=digest,
                    desc="Tokenizing",
                )
        except Exception as error:
            if isinstance(error.__context__, KeyboardInterrupt | SystemExit):  # the workers did not end in time
                raise error.__context__ from None
            raise
        finally:
            disable_progress_bars()

    first_process, parents = os.getpid(), dict[int, int]()
    names, kinds = [f"text {i}" for i in range(len(texts[0]))], [type(text) for text in texts[0]]
    dataset = Dataset.from_dict({name: [row[i] for row in texts] for i, name in enumerate(names)})
    key = key + [[kind.__name__ for kind in kinds]] * (set(kinds) != {str})
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    folder = cache_dir / f"tokenized-{digest}"
    fill_once(folder, fill)
    return concatenate_datasets([Dataset.from_file(str(path)) for path in sorted(folder.glob("*.arrow"))])


def write_dataset(output_dir: Path, splits: dict[str, Dataset], meta: dict[str, Any]) -> None:
    """Write a dataset folder; on an error, nothing is changed."""
    adopt_dataset(output_dir)
    with atomic_folder(output_dir, DATASET) as folder:
        DatasetDict(splits).save_to_disk(str(folder))
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def adopt_dataset(folder: Path) -> None:
    """Write a manifest to a folder that consists of exactly the files of a dataset from an earlier version."""
    try:
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
        ours = not (folder / MANIFEST).exists() and all(EARLIER_FILES.fullmatch(name) for name in names)
        made_by = read_json(folder / "meta.json").get("format") if ours else None
    except (OSError, UserError):
        return
    if made_by in (SFT_FORMAT, PREFERENCE_FORMAT):
        write_text(folder / MANIFEST, make_manifest(folder, DATASET))
