"""Prepared datasets, which are memory-mapped during training.

A dataset folder, written by `lit_llama.prepare`, contains Arrow files and `meta.json`, which describes them.

Columns of a dataset for supervised finetuning:

    input_ids        prompt and response, up to EOS or the end of the turn unless it was truncated
    prompt_length    number of prompt tokens; they are labels too unless meta.json sets `mask_prompt`
    gaps             only if meta.json sets `multi_turn`: the tokens between two answers of a conversation, which are
                     not labels either, as [start, end, start, end, ...]

Columns of a preference dataset:

    prompt           token ids of the prompt
    chosen, rejected token ids of the two responses, each with EOS at the end unless it was truncated

Columns of a dataset of prompts for reinforcement learning:

    prompt           token ids of the prompt
    row              what the reward needs to know, as JSON

The format, the prompt style and the mask are read from meta.json, never inferred from a path.
"""

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from lit_llama.logps import IGNORE_INDEX, find_labels
from lit_llama.packing import pack_answers, pair_shape
from lit_llama.storage.arrow_files import hash_json, hash_tokens, load_split, read_lists, row_lengths
from lit_llama.storage.cache import hash_file
from lit_llama.storage.schema import field, read_json
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError

SFT_FORMAT = "lit-llama-sft-1"
PREFERENCE_FORMAT = "lit-llama-preference-1"
PROMPT_FORMAT = "lit-llama-prompts-1"
# what the rows of a format are, and the default dataset of the scripts that read it
FORMATS = {
    SFT_FORMAT: ("prompts with responses, for SFT", "data/microworld-pirate: python scripts/prepare_microworld.py"),
    PREFERENCE_FORMAT: ("preference pairs, for DPO", "data/microworld-safe: python scripts/prepare_microworld_safe.py"),
    PROMPT_FORMAT: ("prompts for RL", "data/microworld-rl: python scripts/prepare_microworld.py --stage rl"),
}


class Data(Protocol):
    """What the training loop needs from the rows of a split.

    Attributes:
        lengths: (rows,) number of tokens of each row; of its longest sequence, if it has several.
        tokens: (rows,) number of tokens in all sequences of each row.
        weights: (rows,) weight of each row in the mean loss: label tokens for SFT, 1 for a pair.
        sha256: Hash of all tokens.
    """

    lengths: np.ndarray
    tokens: np.ndarray
    weights: np.ndarray
    sha256: str

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """Return rows as tensors on the CPU."""

    def shape(self, indices: np.ndarray) -> tuple[int, int]:
        """Return the number of sequences and of tokens per sequence in the `batch` of these rows, with padding."""


def read_meta(data_dir: Path, format: str) -> dict[str, Any]:
    """Return meta.json of a dataset folder.

    Raises:
        UserError: There is no dataset folder, or its rows have a different format.
    """
    path = Path(data_dir) / "meta.json"
    if not os.path.exists(path):
        raise UserError(
            f"There is no prepared dataset at {data_dir}; name another folder with --data_dir, or write one with a "
            f"scripts/prepare_*.py (the default, {FORMATS[format][1]})."
        )
    meta = read_json(path)
    if meta.get("format") != format:
        content, _ = FORMATS.get(str(meta.get("format")), (f"the unknown format {meta.get('format')!r}", ""))
        raise UserError(f"{data_dir} contains {content}; this script needs {FORMATS[format][0]}.")
    return meta


def check_tokenizer(data_dir: Path, meta: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Check that a dataset was prepared with this tokenizer. Older datasets do not record their BOS and EOS.

    Raises:
        UserError: The tokenizer file, its BOS or EOS token, or the chat template differs; for chats, also
            tokenizer.json, the special tokens or the stop tokens.
    """
    now = tokenizer.identity
    then = {name: meta.get(name, value) for name, value in now.items()}
    if then["tokenizer_sha256"] != now["tokenizer_sha256"]:
        raise UserError(
            f"{data_dir} was tokenized with a different tokenizer than {tokenizer.path}; prepare it again with this "
            "base model's --checkpoint_dir, or name another folder with --data_dir."
        )
    if then != now:
        before, after = (f"BOS {i['bos_id']} and EOS {i['eos_id']}" for i in (then, now))
        raise UserError(
            f"{data_dir} was prepared with {before}, but {tokenizer.path.parent} now has {after} (-1 means none); "
            "prepare it again."
        )
    template, tokens = meta.get("chat_template_sha256"), meta.get("chat_tokens_sha256")
    if template is not None and (tokenizer.template is None or tokenizer.template.sha256 != template):
        raise UserError(
            f"{data_dir} was prepared with a different chat template than that of {tokenizer.path.parent}; prepare it "
            "again."
        )
    if tokens is not None and tokens != hash_chat_tokens(tokenizer):
        raise UserError(
            f"{data_dir} was prepared with other special or stop tokens, or another tokenizer.json, than "
            f"{tokenizer.path.parent} has; prepare it again."
        )


def hash_chat_tokens(tokenizer: Tokenizer) -> str:
    """Return a hash of tokenizer.json and of the special, added and stop tokens, which token ids of chats depend on.

    Without a chat template, those of the plain tokenizer are hashed.
    """
    path = tokenizer.path.parent / "tokenizer.json"
    file = hash_file(path).hexdigest() if path.is_file() else None
    engine = tokenizer.engine if tokenizer.template is None else tokenizer.chat_engine
    return hashlib.sha256(json.dumps([file, engine.control, engine.added, tokenizer.stop_ids]).encode()).hexdigest()


class Split:
    """One split of a dataset folder.

    Attributes:
        rows: The rows, as numpy arrays.
        meta: The content of meta.json.

    Args:
        data_dir: The dataset folder.
        split: "train" or "test".
        tokenizer: If given, the tokenizer that the dataset must have been prepared with.
        max_rows: If given, only the first rows are used.

    Raises:
        UserError: The folder is missing, damaged or of a different format, or was prepared with another tokenizer.
    """

    format: str  # format that meta.json must name
    columns: tuple[str, ...]  # its numeric columns

    def __init__(self, data_dir: Path, split: str, tokenizer: Tokenizer | None = None, max_rows: int | None = None):
        self.meta = read_meta(data_dir, self.format)
        if tokenizer is not None:
            check_tokenizer(data_dir, self.meta, tokenizer)
        vocab_size = 2**31 if tokenizer is None else tokenizer.vocab_size
        rows = load_split(Path(data_dir), split, self.columns_of(data_dir), vocab_size)
        self.rows = rows if max_rows is None else rows.select(range(min(max_rows, len(rows))))
        self.rows.set_format("numpy")

    def columns_of(self, data_dir: Path) -> tuple[str, ...]:
        """Return the columns that the dataset has."""
        return self.columns

    def __len__(self) -> int:
        return len(self.rows)

    def shape(self, indices: np.ndarray) -> tuple[int, int]:
        """Return the number of sequences and of tokens per sequence, (B, T), see `Data`."""
        return len(indices), int(self.lengths[indices].max())


class SFTData(Split):
    """One split of a dataset for supervised finetuning (`Data`): a row is a prompt with a response.

    `weights` is the number of labels of each row.
    """

    format = SFT_FORMAT
    columns = ("input_ids", "prompt_length")

    def __init__(self, data_dir: Path, split: str, tokenizer: Tokenizer | None = None, max_rows: int | None = None):
        super().__init__(data_dir, split, tokenizer, max_rows)
        self.lengths = row_lengths(self.rows, "input_ids")
        n_prompt = self.rows.with_format("arrow")["prompt_length"].to_numpy()
        self.n_masked = n_prompt * field(self.meta, "mask_prompt", bool, data_dir)
        self.weights = self.lengths - np.maximum(1, self.n_masked)  # nothing predicts the first token
        if (self.weights < 0).any():
            raise UserError(f"{data_dir} has rows that are shorter than their prompts; prepare the dataset again.")
        self.tokens, self.gaps = self.lengths, None
        if "gaps" in self.rows.column_names:
            self.gaps = read_lists(self.rows, "gaps")
            if any(
                len(gaps) % 2 or (np.diff(gaps, prepend=first, append=last) < 0).any()
                for gaps, first, last in zip(self.gaps, n_prompt, self.lengths, strict=True)
            ):
                raise UserError(f"{data_dir} has rows whose gaps are not within them; prepare the dataset again.")
            self.weights = self.weights - np.array([gaps[1::2].sum() - gaps[::2].sum() for gaps in self.gaps])

    def columns_of(self, data_dir: Path) -> tuple[str, ...]:
        return (*self.columns, *["gaps"] * field(self.meta, "multi_turn", bool, data_dir, False))

    @cached_property
    def sha256(self) -> str:
        """Hash of all token ids, of the boundaries between them, and of the lengths of the prompts."""
        digest = hash_tokens(self.rows, ("input_ids",))
        digest.update(np.asarray(self.n_masked, np.int64).tobytes())
        if self.gaps is not None:
            digest.update(hash_tokens(self.rows, ("gaps",)).digest())
        return digest.hexdigest()

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """Return rows as `pad_rows` does; labels are -1 where nothing is predicted."""
        ids = [torch.from_numpy(row).long() for row in self.rows[indices]["input_ids"]]
        labels = [row.clone() for row in ids]
        for row, n_masked in zip(labels, self.n_masked[indices], strict=True):
            row[:n_masked] = IGNORE_INDEX
        for row, i in zip(labels, indices if self.gaps is not None else (), strict=False):
            for start, end in self.gaps[i].reshape(-1, 2):
                row[start:end] = IGNORE_INDEX
        return pad_rows(ids, labels)

    def prompts(self, count: int) -> list[tuple[list[int], list[int]]]:
        """Return the first rows as (prompt, response) token ids; for a conversation, only the first answer."""
        rows = self.rows[:count]
        ends = [None] * count if self.gaps is None else [gaps[0] if len(gaps) else None for gaps in self.gaps]
        pairs = zip(rows["input_ids"], rows["prompt_length"], ends, strict=False)
        return [(ids[:n].tolist(), ids[n:end].tolist()) for ids, n, end in pairs]


class PreferenceData(Split):
    """One split of a preference dataset (`Data`): a row is a prompt with two responses, and has weight 1.

    Attributes:
        n_embd: Width of the model; it decides whether both responses to a prompt share a sequence. 0: they never do.
    """

    format = PREFERENCE_FORMAT
    columns = ("prompt", "chosen", "rejected")
    n_embd = 0

    def __init__(self, data_dir: Path, split: str, tokenizer: Tokenizer | None = None, max_rows: int | None = None):
        super().__init__(data_dir, split, tokenizer, max_rows)
        self.n_prompt, *responses = (row_lengths(self.rows, name) for name in self.columns)
        self.n_responses = np.stack(responses)  # (2, rows)
        if not (self.n_prompt.all() and self.n_responses.all()):
            raise UserError(f"{data_dir} has rows with an empty prompt or response; prepare the dataset again.")
        self.lengths = self.n_prompt + self.n_responses.max(0)
        self.tokens = 2 * self.n_prompt + self.n_responses.sum(0)
        self.weights = np.ones(len(self))

    @cached_property
    def sha256(self) -> str:
        """Hash of all token ids and of the boundaries between them."""
        return hash_tokens(self.rows, ("prompt", "chosen", "rejected")).hexdigest()

    def shape(self, indices: np.ndarray) -> tuple[int, int]:
        """Return (B, T) for B pairs whose responses share sequences, and (2B, T) otherwise, see `pair_shape`."""
        return pair_shape(self.n_prompt[indices], self.n_responses[:, indices], self.n_embd)

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """Return B pairs.

        Returns:
            rows: (B,) int64, the row number of each pair. If pairs share sequences, the tensors of `pack_answers`, each
            chosen response first; otherwise the same without segments: all chosen responses, then all rejected ones.
        """
        rows = self.rows[indices]
        prompts, *sides = ([ids.tolist() for ids in rows[name]] for name in self.columns)
        if self.shape(indices)[0] == len(prompts):
            batch = pack_answers([(prompt, pair) for prompt, *pair in zip(prompts, *sides, strict=True)])
        else:
            batch = pack_answers([(p, [answer]) for side in sides for p, answer in zip(prompts, side, strict=True)])
            del batch["segments"]  # causal attention is faster
        return {**batch, "rows": torch.as_tensor(indices)}

    def prompts(self, count: int) -> list[tuple[list[int], list[int]]]:
        """Return the first rows as (prompt, chosen response) token ids."""
        rows = self.rows[:count]
        return [(p.tolist(), c.tolist()) for p, c in zip(rows["prompt"], rows["chosen"], strict=True)]


class PromptData(Split):
    """One split of a dataset of prompts, to which reinforcement learning samples the answers.

    `weights` is 1 for each prompt, `lengths` includes one token of an answer.
    """

    format = PROMPT_FORMAT
    columns = ("prompt",)

    def __init__(self, data_dir: Path, split: str, tokenizer: Tokenizer | None = None, max_rows: int | None = None):
        super().__init__(data_dir, split, tokenizer, max_rows)
        self.lengths = row_lengths(self.rows, "prompt") + 1
        self.tokens, self.weights = self.lengths, np.ones(len(self))

    @cached_property
    def sha256(self) -> str:
        """Hash of all rows."""
        return hash_json(self.rows, ("prompt", "row")).hexdigest()

    def prompt_ids(self, indices: np.ndarray) -> list[list[int]]:
        """Return the token ids of the prompts of rows."""
        return [ids.tolist() for ids in self.rows[indices]["prompt"]]

    def sources(self, indices: np.ndarray) -> list[Any]:
        """Return the column `row` of rows: what the reward needs to know about each prompt."""
        return [json.loads(str(row)) for row in self.rows[indices]["row"]]

    def prompts(self, count: int) -> list[tuple[list[int], list[int]]]:
        """Return the first rows as (prompt, no response) token ids."""
        return [(ids, []) for ids in self.prompt_ids(np.arange(min(count, len(self))))]


def pad_rows(ids: list[torch.Tensor], labels: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return idx and labels, (B, T) int64, padded on the right, and label_index, (n,) from `find_labels`."""
    pad = torch.nn.utils.rnn.pad_sequence
    idx, padded = pad(ids, batch_first=True), pad(labels, batch_first=True, padding_value=IGNORE_INDEX)
    return {"idx": idx, "labels": padded, "label_index": find_labels(padded)}


def check_rows(data: Data, split: str, max_tokens: int) -> None:
    """Check that data can be trained on.

    Raises:
        UserError: There are no rows, or a row is longer than the model's context of `max_tokens`.
    """
    if len(data.lengths) == 0:
        raise UserError(f"There are no {split} rows.")
    if data.lengths.max() > max_tokens:
        raise UserError(
            f"A {split} row has {data.lengths.max()} tokens and the model's context is {max_tokens}; prepare the data "
            "with a smaller --max_seq_length."
        )


def rows_sha256(*splits: Data) -> dict[str, str]:
    """Return hashes of all rows: of their lengths and weights, and of their tokens."""
    rows, tokens = hashlib.sha256(), hashlib.sha256()
    for data in splits:
        rows.update(np.asarray(data.lengths, np.int64).tobytes() + np.asarray(data.weights, np.float64).tobytes())
        tokens.update(data.sha256.encode())
    return {"rows": rows.hexdigest(), "tokens": tokens.hexdigest()}
