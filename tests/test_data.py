"""Reading rows, preparing datasets, batching and planning epochs."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers
import torch
from datasets import load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_llama.data import IGNORE_INDEX, PreferenceData, SFTData
from lit_llama.epochs import plan_epoch
from lit_llama.prepare import held_out_by_hash, prepare_sft
from lit_llama.prepare_settings import PrepareSettings
from lit_llama.prompts import get_prompt_style
from lit_llama.storage.manifest import MANIFEST
from lit_llama.storage.rows import read_rows, text_field
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError

ROOT = Path(__file__).parents[1]


# == prepare_sft ==


def pair(row: dict[str, str], number: int) -> tuple[str, str]:
    return text_field(row, number, "p"), text_field(row, number, "r")


def prepare(output_dir: Path, tokenizer: Tokenizer, rows: list[Any], **changes: Any) -> dict[str, Any]:
    defaults = dict(
        max_seq_length=40, mask_prompt=True, test_fraction=0.25, seed=1, num_proc=1, about={"source": "a test"}
    )
    return prepare_sft(rows, pair, output_dir=output_dir, tokenizer=tokenizer, **{**defaults, **changes})


def all_rows(folder: Path) -> list[tuple[list[int], int]]:
    rows = [row for split in ("train", "test") for row in load_from_disk(str(folder / split))]
    return sorted((row["input_ids"], row["prompt_length"]) for row in rows)


def test_a_prepared_row_is_prompt_response_and_one_eos(tmp_path, tokenizer):
    meta = prepare(tmp_path / "out", tokenizer, [{"p": "the cat", "r": "sat </s>"}, {"p": "the dog", "r": "ate"}])
    rows = [
        (tokenizer.encode(p, bos=True), tokenizer.encode(r)) for p, r in (("the cat", "sat </s>"), ("the dog", "ate"))
    ]
    assert all_rows(tmp_path / "out") == sorted((p + r + [tokenizer.eos_id], len(p)) for p, r in rows)
    assert meta == json.loads((tmp_path / "out/meta.json").read_text())
    assert meta == {
        "format": "lit-llama-sft-1", "source": "a test", "max_seq_length": 40, "mask_prompt": True, "seed": 1,
        "test_fraction": 0.25, "split_by": "draw", "tokenizer_sha256": tokenizer.sha256, "bos_id": 1, "eos_id": 2,
        "counts": {"rows": 2, "empty": 0, "too_long": 0, "cut": 0, "prompts": 2, "train": 1, "test": 1},
    }  # fmt: skip


texts = st.text(st.sampled_from("the cat é\n"), max_size=60)


@given(rows=st.lists(st.fixed_dictionaries({"p": texts, "r": texts}), max_size=12), length=st.integers(3, 50))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_rows_are_kept_truncated_or_dropped(tmp_path_factory, tokenizer, rows, length):
    rows = [*rows, {"p": "a", "r": "the cat" * 20}, {"p": "b", "r": "t"}]
    out = tmp_path_factory.mktemp("sft") / "out"
    expected, empty, too_long, cut = [], 0, 0, 0
    for row in rows:
        prompt, response = tokenizer.encode(row["p"], bos=True), tokenizer.encode(row["r"])
        if not row["p"].strip() or not row["r"].strip():
            empty += 1
        elif len(prompt) + 2 > length:
            too_long += 1
        else:
            cut += len(prompt) + len(response) + 1 > length
            expected.append(((prompt + response)[: length - 1] + [tokenizer.eos_id], len(prompt)))
    if len(expected) < 2:  # "b" itself may be too long
        with pytest.raises(UserError, match="a dataset needs at least 2"):
            prepare(out, tokenizer, rows, max_seq_length=length)
        return
    counts = prepare(out, tokenizer, rows, max_seq_length=length)["counts"]
    assert all_rows(out) == sorted(expected)
    assert (counts["rows"], counts["empty"], counts["too_long"], counts["cut"]) == (len(rows), empty, too_long, cut)
    assert counts["train"] + counts["test"] == len(expected)
    for ids, prompt_length in all_rows(out):
        assert ids.count(tokenizer.eos_id) == 1 and ids[-1] == tokenizer.eos_id
        assert prompt_length < len(ids) - 1 <= length


def test_a_prompt_needs_room_for_one_token_and_eos(tmp_path, tokenizer):
    n = len(tokenizer.encode("the cat", bos=True))
    rows = [{"p": "the cat", "r": "sat on"}, {"p": "the hat", "r": "ate it"}]
    assert n == len(tokenizer.encode("the hat", bos=True))
    prepare(tmp_path / "fits", tokenizer, rows, max_seq_length=n + 2)
    assert [(len(ids), ids[-1], length) for ids, length in all_rows(tmp_path / "fits")] == [(n + 2, 2, n)] * 2
    message = rf"^0 of 2 rows can .* 0 with an empty text, 2 with too long a prompt \(max_seq_length is {n + 1}\)"
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "full", tokenizer, rows, max_seq_length=n + 1)


def make_rows(count: int) -> list[dict[str, str]]:
    return [{"p": f"the cat {i}", "r": "sat " * (i % 7 + 1)} for i in range(count)]


@pytest.mark.parametrize(("max_seq_length", "words", "noted"), [(80, 200, True), (64, 200, False), (80, 3, False)])
def test_truncated_rows_beyond_the_context_are_noted(tmp_path, base_dir, capsys, max_seq_length, words, noted):
    rows = [{"p": f"the cat {i}", "r": "sat " * words} for i in range(4)]
    prepare(tmp_path / "out", Tokenizer(base_dir), rows, max_seq_length=max_seq_length)
    note = f"note: the context of {base_dir} is 64 tokens, and training refuses longer rows; set --max_seq_length 64."
    assert (note in capsys.readouterr().err) == noted


def test_the_split_is_seeded_and_covers_every_row(tmp_path, tokenizer):
    splits = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        counts = prepare(tmp_path / name, tokenizer, make_rows(40), seed=seed)["counts"]
        assert (counts["train"], counts["test"]) == (30, 10)
        assert len(set(map(str, all_rows(tmp_path / name)))) == 40
        splits[name] = load_from_disk(str(tmp_path / name / "test"))["input_ids"][:]
    assert splits["a"] == splits["b"] != splits["c"]


few_texts = st.lists(st.text(st.sampled_from("abc"), min_size=1), min_size=2)


@given(prompts=few_texts, others=few_texts, share=st.floats(0.01, 0.99))
def test_the_hash_split_of_a_prompt_does_not_depend_on_other_rows(prompts, others, share):
    splits = []
    for rows in (prompts, others):
        if len(set(rows)) < 2:
            with pytest.raises(UserError, match="have the same prompt"):
                held_out_by_hash(rows, share, seed=3)
            return
        in_test = held_out_by_hash(rows, share, seed=3)
        splits.append({row: test for row, test in zip(rows, in_test.tolist(), strict=True)})
        assert all(splits[-1][row] == test for row, test in zip(rows, in_test.tolist(), strict=True))
        assert 0 < sum(in_test) < len(rows)
    moved = {row for row in splits[0] if splits[1].get(row, splits[0][row]) != splits[0][row]}
    assert len(moved) <= 2  # rows moved to fill an empty split: at most one into each


def test_the_hash_split_holds_out_about_the_requested_fraction():
    prompts = [f"prompt {i}" for i in range(20_000)]
    in_test = held_out_by_hash(prompts, 0.1, seed=1)
    assert 0.09 < in_test.mean() < 0.11
    assert 0.05 < held_out_by_hash(prompts, 0.1, seed=2)[in_test].mean() < 0.15  # another seed holds out other prompts
    assert held_out_by_hash(prompts, 0.2, seed=1)[in_test].all()


def test_a_bad_row_leaves_the_existing_dataset_unchanged(tmp_path, tokenizer):
    out = tmp_path / "data/out"
    prepare(out, tokenizer, make_rows(4))
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"Row 3: 'r' is not text but int\."):
        prepare(out, tokenizer, [*make_rows(2), {"p": "x", "r": 3}])
    with pytest.raises(UserError, match=r"test_fraction is 1\.0"):
        PrepareSettings(test_fraction=1.0)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    prepare(out, tokenizer, make_rows(5))  # valid rows replace it
    assert len(all_rows(out)) == 5
    assert sorted(path.name for path in out.parent.iterdir()) == [".aligner-cache", "out"]


def test_a_folder_with_other_files_is_not_replaced(tmp_path, tokenizer):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.txt, which is not part of a prepared dataset"):
        prepare(tmp_path, tokenizer, make_rows(4))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_folder_of_an_earlier_version_is_replaced(tmp_path, tokenizer):
    """Such a folder has no manifest; it is recognized by its exact set of files and the format in meta.json."""
    out = tmp_path / "out"
    for name, content in (("train/notes.txt", "mine"), ("meta.json", '{"format": "mine"}'), ("meta.json", "[]")):
        prepare(out, tokenizer, make_rows(4))
        (out / MANIFEST).unlink()
        before = (out / name).read_text() if (out / name).exists() else None
        (out / name).write_text(content)
        with pytest.raises(UserError, match="which is not part of a prepared dataset"):
            prepare(out, tokenizer, make_rows(5))
        assert (out / name).read_text() == content and not (out / MANIFEST).exists()
        if before is None:
            (out / name).unlink()
        else:
            (out / name).write_text(before)
        prepare(out, tokenizer, make_rows(5))
        assert len(all_rows(out)) == 5


def test_tokenization_is_cached(tmp_path, tokenizer_path, monkeypatch):
    tokenizer = Tokenizer(tokenizer_path)
    prepare(tmp_path / "a", tokenizer, make_rows(8))
    monkeypatch.setattr(tokenizer, "encode", lambda *args, **kwargs: pytest.fail("tokenized again"))
    prepare(tmp_path / "b", tokenizer, make_rows(8), seed=9, test_fraction=0.5)
    assert all_rows(tmp_path / "a") == all_rows(tmp_path / "b")
    with pytest.raises(BaseException, match="tokenized again"):  # not cached for another max_seq_length
        prepare(tmp_path / "c", tokenizer, make_rows(8), max_seq_length=30)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def move_behind_a_link(path: Path) -> None:
    path.parent.rename(path.parents[1] / "elsewhere")
    (path.parents[1] / "elsewhere" / path.name).write_text("mine")
    path.parent.symlink_to("elsewhere")


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_a_bit, Path.unlink, make_pipe, move_behind_a_link,
     lambda path: (path.parent / "sha256.json").unlink(), lambda path: make_pipe(path.parent / "sha256.json")],
)  # fmt: skip
def test_a_damaged_cache_is_computed_again(damage, tmp_path, tokenizer):
    prepare(tmp_path / "a", tokenizer, make_rows(8))
    (rows,) = (tmp_path / ".aligner-cache").rglob("*.arrow")
    damage(rows)
    prepare(tmp_path / "b", tokenizer, make_rows(8))
    assert all_rows(tmp_path / "a") == all_rows(tmp_path / "b")
    moved = tmp_path / ".aligner-cache/elsewhere" / rows.name
    assert not moved.exists() or moved.read_text() == "mine"


def test_the_number_of_processes_does_not_change_the_result(tmp_path, tokenizer):
    for name, num_proc in (("one", 1), ("two", 2)):
        prepare(tmp_path / name / "out", tokenizer, make_rows(2000), num_proc=num_proc)
    assert len(list((tmp_path / "two/.aligner-cache").rglob("*.arrow"))) == 2
    for split in ("train", "test"):
        one, two = (load_from_disk(str(tmp_path / name / "out" / split)) for name in ("one", "two"))
        assert one.to_dict() == two.to_dict()


def test_cached_tokens_are_not_reused_with_another_eos(tmp_path):
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "cat": 1, "<a>": 2, "<b>": 3}, "the"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    engine.save(str(tmp_path / "tokenizer.json"))
    for eos in ("<a>", "<b>"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        tokenizer = Tokenizer(tmp_path)
        prepare(tmp_path / "out", tokenizer, [{"p": "the", "r": "cat"}, {"p": "cat", "r": "the"}])
        assert {ids[-1] for ids, _ in all_rows(tmp_path / "out")} == {tokenizer.eos_id}
    SFTData(tmp_path / "out", "train", tokenizer)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<a>"}))
    message = r"with BOS -1 and EOS 3, but .* now has BOS -1 and EOS 2 \(-1 means none\)"
    with pytest.raises(UserError, match=message):
        SFTData(tmp_path / "out", "train", Tokenizer(tmp_path))
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    del meta["bos_id"], meta["eos_id"]  # as in datasets of earlier versions
    (tmp_path / "out/meta.json").write_text(json.dumps(meta))
    SFTData(tmp_path / "out", "train", Tokenizer(tmp_path))


def test_the_cache_folder_has_a_cachedir_tag(tmp_path, tokenizer):
    (tmp_path / ".cache").mkdir()
    prepare(tmp_path / "out", tokenizer, make_rows(4))
    assert list((tmp_path / ".cache").iterdir()) == []  # it may belong to the user
    cache = tmp_path / ".aligner-cache"
    assert (cache / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")
    assert "may be deleted" in (cache / "README").read_text()


# == SFTData ==


def test_batches_are_padded_and_masked(tmp_path, tokenizer):
    for mask_prompt in (True, False):
        prepare(tmp_path / "out", tokenizer, make_rows(12), mask_prompt=mask_prompt)
        data = SFTData(tmp_path / "out", "train", tokenizer)
        rows = load_from_disk(str(tmp_path / "out/train"))
        assert len(data) == len(rows) == 9
        picked = np.array([5, 0, 7])
        batch = data.batch(picked)
        longest = max(len(rows[int(i)]["input_ids"]) for i in picked)
        assert batch["idx"].shape == batch["labels"].shape == (3, longest)
        for i, idx, labels in zip(picked, batch["idx"], batch["labels"], strict=True):
            ids, n = rows[int(i)]["input_ids"], rows[int(i)]["prompt_length"]
            assert idx[: len(ids)].tolist() == ids
            masked = [IGNORE_INDEX] * n + ids[n:] if mask_prompt else ids
            assert labels.tolist() == masked + [IGNORE_INDEX] * (longest - len(ids))
            assert data.lengths[i] == len(ids)
            assert data.weights[i] == (labels[1:] != IGNORE_INDEX).sum()  # the targets of the loss


def test_rows_of_equal_length_can_be_batched(tmp_path, tokenizer):
    prepare(tmp_path / "out", tokenizer, [{"p": f"cat {i}", "r": "sat"} for i in range(8)])
    data = SFTData(tmp_path / "out", "train")
    assert data.batch(np.arange(6))["idx"].dtype == torch.int64
    assert len(data.prompts(2)) == 2


def test_max_rows_and_prompts(tmp_path, tokenizer):
    prepare(tmp_path / "out", tokenizer, make_rows(12))
    data = SFTData(tmp_path / "out", "train", max_rows=4)
    assert len(data) == len(data.weights) == 4
    (prompt, response), *_ = data.prompts(1)
    ids = load_from_disk(str(tmp_path / "out/train"))[0]["input_ids"]
    assert prompt + response == ids and tokenizer.decode(prompt).startswith("the cat") and response[-1] == 2


def test_a_different_tokenizer_is_refused(tmp_path, tokenizer, tokenizer_path):
    prepare(tmp_path / "out", tokenizer, make_rows(4))
    other = tmp_path / "tokenizer.model"
    other.write_bytes(tokenizer_path.read_bytes() + b"\x22\x00")  # one more empty field, so the file has another hash
    with pytest.raises(UserError, match="was tokenized with a different tokenizer than"):
        SFTData(tmp_path / "out", "train", Tokenizer(other))


def test_rows_in_another_folder_are_not_read(tmp_path, tokenizer):
    prepare(tmp_path / "out", tokenizer, make_rows(4))
    (tmp_path / "out/train/data-00000-of-00001.arrow").rename(tmp_path / "secret.arrow")
    state = tmp_path / "out/train/state.json"
    for name in ("../../secret.arrow", str(tmp_path / "secret.arrow")):
        content = json.loads(state.read_text())
        content["_data_files"] = [{"filename": name}]
        state.write_text(json.dumps(content))
        with pytest.raises(UserError, match="expected the name of a file in its folder"):
            SFTData(tmp_path / "out", "train")


def test_damaged_folders(tmp_path, tokenizer):
    with pytest.raises(UserError, match="There is no prepared dataset at"):
        SFTData(tmp_path, "train")
    prepare(tmp_path / "out", tokenizer, make_rows(4))
    meta = tmp_path / "out/meta.json"
    text = meta.read_text()
    for damaged, message in (("{", "is not JSON"), (text.replace("sft-1", "dpo-1"), "contains the unknown format"),
                             (json.dumps({"format": ["sft"]}), r"contains the unknown format \['sft'\]")):  # fmt: skip
        meta.write_text(damaged)
        with pytest.raises(UserError, match=message):
            SFTData(tmp_path / "out", "train")
    meta.write_text(text)
    with pytest.raises(UserError, match="contains prompts with responses, for SFT; this script needs preference pairs"):
        PreferenceData(tmp_path / "out", "train")
    with pytest.raises(UserError, match=r"There is no file at .*dev/state\.json; prepare the dataset again"):
        SFTData(tmp_path / "out", "dev")


def write_arrow(path: Path, **columns: Any) -> None:
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def test_arrow_files_are_checked_before_they_are_used(tmp_path, tokenizer):
    prepare(tmp_path / "out", tokenizer, make_rows(4))
    path = tmp_path / "out/train/data-00000-of-00001.arrow"
    good, good_rows = path.read_bytes(), all_rows(tmp_path / "out")
    cases: dict[str, Any] = {
        "is damaged": lambda: path.write_bytes(good[: len(good) // 2]),
        "is damaged (Tried reading schema message": lambda: path.write_bytes(b""),
        "has changed since it was written": lambda: path.write_bytes((tmp_path / "out/test" / path.name).read_bytes()),
        "input_ids does not hold whole numbers": lambda: write_arrow(path, input_ids=["a"], prompt_length=[1]),
        "input_ids holds -5": lambda: write_arrow(path, input_ids=[[1, -5]], prompt_length=[1]),
        "holds the token id 70000; the tokenizer": lambda: write_arrow(path, input_ids=[[1, 70000]], prompt_length=[1]),
        'prompt_length" does not exist': lambda: write_arrow(path, input_ids=[[1, 5]]),
        "is a folder, not a file": lambda: (path.unlink(), path.mkdir()),
    }
    for message, damage in cases.items():
        damage()
        with pytest.raises(UserError, match="prepare the dataset again") as error:
            SFTData(tmp_path / "out", "train", tokenizer)
        assert message in str(error.value)
    path.rmdir()
    path.write_bytes(good)
    assert all_rows(tmp_path / "out") == good_rows


# == plan_epoch ==

PLANS = [plan_epoch, functools.partial(plan_epoch, sorted_batches=1)]


@given(
    plan=st.sampled_from(PLANS),
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=300),
    micro=st.integers(1, 5),
    accumulate=st.integers(1, 4),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 5),
)
def test_an_epoch_contains_every_row_once(plan, lengths, micro, accumulate, seed, epoch):
    lengths, batch = np.array(lengths), micro * accumulate
    before, state = lengths.copy(), np.random.get_state()[1].copy()
    steps = plan(lengths, batch, micro, seed, epoch)
    assert sorted(int(row) for step in steps for m in step for row in m) == list(range(len(lengths)))
    assert len(steps) == -(-len(lengths) // batch)
    for step in steps[:-1]:
        assert [len(m) for m in step] == [micro] * accumulate
    assert all(1 <= len(m) <= micro for m in steps[-1]) and len(steps[-1]) <= accumulate
    again = plan(lengths, batch, micro, seed, epoch)
    assert [[m.tolist() for m in step] for step in steps] == [[m.tolist() for m in step] for step in again]
    assert np.array_equal(lengths, before) and np.array_equal(state, np.random.get_state()[1])


@pytest.mark.parametrize("plan", PLANS, ids=["grouped", "random"])
def test_epochs_and_seeds_give_different_orders(plan):
    lengths = np.arange(200) % 37 + 1
    orders = {
        str([m.tolist() for step in plan(lengths, 16, 4, seed, epoch) for m in step])
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_steps_that_draw_from_all_rows_have_both_lengths():
    """With 200 short and 200 long rows, the probability that a step of 16 has only one length is about 2 ** -15."""
    lengths = np.repeat([10, 30], 200)
    for step in plan_epoch(lengths, 16, 4, seed=0, epoch=0, sorted_batches=1):
        assert set(lengths[np.concatenate(step)]) == {10, 30}
        assert all((np.diff(lengths[micro]) >= 0).all() for micro in step)  # sorted within the step to limit padding
    grouped = [{*lengths[np.concatenate(step)]} for step in plan_epoch(lengths, 16, 16, seed=0, epoch=0)]
    assert {10} in grouped and {30} in grouped


def test_steps_of_a_group_are_not_sorted_by_length():
    """Each of the 30 groups has 4 steps, which happen to be sorted with probability 1/24."""
    lengths = np.arange(16 * 10)
    steps = [plan_epoch(lengths, 4, 2, seed, epoch=0, sorted_batches=4) for seed in range(3)]
    means = np.array([lengths[np.concatenate(step)].mean() for plan in steps for step in plan]).reshape(30, 4)
    assert (np.diff(means) > 0).all(axis=1).mean() < 0.3


def test_the_rows_of_a_short_step_are_drawn_at_random():
    """In 40 epochs of 11 rows, the longest row is in the short step of 3 rows about 11 times."""
    plans = [plan_epoch(np.arange(11), 8, 4, seed=0, epoch=epoch) for epoch in range(40)]
    short = [np.concatenate(plan[-1]) for plan in plans]
    assert {len(rows) for rows in short} == {3}
    assert set(np.concatenate(short)) == set(range(11))
    assert 2 <= sum(10 in rows for rows in short) <= 20


def padding_share(lengths: np.ndarray, steps: list[list[np.ndarray]]) -> float:
    """Return the fraction of padding among all tokens computed in the planned steps."""
    computed = [len(m) * lengths[m].max() for step in steps for m in step]
    real = [lengths[m].sum() for step in steps for m in step]
    return 1 - sum(real) / sum(computed)


def test_grouping_by_length_limits_padding():
    """The lengths resemble Alpaca's: a median near 100 tokens and a long tail, truncated at 512."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.7, 0.5, 20_000), 40, 512).astype(int)
    for micro in (4, 8, 16):
        steps = plan_epoch(lengths, 64, micro, seed=0, epoch=0)
        assert padding_share(lengths, steps) <= 0.05
    unsorted = [np.split(np.arange(64 * i, 64 * i + 64), 16) for i in range(300)]
    assert padding_share(lengths, unsorted) > 0.25  # without grouping


# == scripts/prepare_alpaca.py ==


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_processes_without_a_traceback(number, code, tmp_path, tokenizer_path):
    rows = [{"instruction": f"the cat {i}", "input": "", "output": "sat " * 200} for i in range(40_000)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "base").mkdir()
    (tmp_path / "base/tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    flags = (
        f"--checkpoint_dir base --data_file rows.json --output_dir out --num_proc 2 --max_seq_length {2**20}".split()
    )
    command = [sys.executable, ROOT / "scripts/prepare_alpaca.py", *flags]
    # if these tests run as a background job of a shell, SIGINT may be ignored
    reset = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=err, start_new_session=True, preexec_fn=reset)
    while b" 1000/" not in (tmp_path / "err").read_bytes():
        assert process.poll() is None, (tmp_path / "err").read_text()
        time.sleep(0.02)
    os.killpg(process.pid, number)
    assert process.wait(300) == code
    assert "Traceback" not in (tmp_path / "err").read_text()
    with pytest.raises(ProcessLookupError):
        for _ in range(300):  # until no process of the group is left
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    assert {path.name for path in tmp_path.iterdir()} == {"rows.json", "base", "err", ".aligner-cache"}
    assert not list(tmp_path.glob(".aligner-cache/.aligner-tmp*"))


def test_sigterm_ends_a_pool_with_an_idle_worker(tmp_path, tokenizer_path):
    """An idle worker holds the lock of the pool's queue, and the pool would wait for it forever."""
    outputs = ["sat"] * 1000 + ["sat " * 30_000] * 1000  # the first worker finishes immediately
    rows = [{"instruction": f"the cat {i}", "input": "", "output": output} for i, output in enumerate(outputs)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = f"--data_file rows.json --output_dir out --num_proc 2 --max_seq_length {2**20}".split()
    command = [sys.executable, ROOT / "scripts/prepare_alpaca.py", "--checkpoint_dir", tokenizer_path.parent, *flags]
    with (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=err, start_new_session=True)
    while b" 1000/" not in (tmp_path / "err").read_bytes():
        assert process.poll() is None, (tmp_path / "err").read_text()
        time.sleep(0.02)
    time.sleep(0.3)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    try:
        assert process.wait(60) == 143
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def run_prepare(python: str, tmp_path: Path, tokenizer_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [python, str(ROOT / "scripts/prepare_alpaca.py"), "--checkpoint_dir", str(tokenizer_path.parent)]
    command += ["--output_dir", "data/out", "--num_proc", "1", *arguments]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)


ALPACA = [
    {"instruction": "Give three {tips}.", "input": "", "output": "Eat, sleep, run."},
    {"instruction": "Translate.", "input": "le chat", "output": "the cat"},
    {"instruction": "Say nothing.", "input": "", "output": ""},
    {"instruction": "Count.", "input": None, "output": "1 2 3"},
]


def expected_alpaca(tokenizer: Tokenizer) -> list[tuple[list[int], int]]:
    style = get_prompt_style("alpaca")
    rows = []
    for row in ALPACA:
        prompt = tokenizer.encode(style.render(row["instruction"], row["input"] or ""), bos=True)
        if row["output"]:
            rows.append((prompt + tokenizer.encode(row["output"], eos=True), len(prompt)))
    return sorted(rows)


def test_prepare_alpaca_from_a_file(tmp_path, tokenizer, tokenizer_path, python):
    (tmp_path / "rows.json").write_text(json.dumps(ALPACA))
    result = run_prepare(python, tmp_path, tokenizer_path, "--data_file", "rows.json")
    assert (result.returncode, result.stdout) == (0, "data/out\n"), result.stderr
    assert "4 rows. Dropped: 1 with an empty text, 0 with too long a prompt." in result.stderr
    assert all_rows(tmp_path / "data/out") == expected_alpaca(tokenizer)
    meta = json.loads((tmp_path / "data/out/meta.json").read_text())
    assert (meta["source"], meta["prompt_style"]) == ("rows.json", "alpaca")


def test_prepare_alpaca_from_a_repository(tmp_path, tokenizer, tokenizer_path):
    """Use the code path of a download, with a local folder in the schema of tatsu-lab/alpaca instead of the Hub."""
    folder = tmp_path / "alpaca/data"
    folder.mkdir(parents=True)
    rows = [{**row, "input": row["input"] or "", "text": "rendered"} for row in ALPACA]
    pa.parquet.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001-a09b74b3ef9c3b56.parquet")
    # datasets reads HF_HOME when it is imported
    result = run_prepare(sys.executable, tmp_path, tokenizer_path, "--repo_id", "./alpaca")
    assert (result.returncode, result.stdout) == (0, "data/out\n"), result.stderr
    assert all_rows(tmp_path / "data/out") == expected_alpaca(tokenizer)


def test_prepare_alpaca_names_the_bad_row(tmp_path, tokenizer_path, python):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*ALPACA, {"instruction": "x", "response": "y"}])))
    result = run_prepare(python, tmp_path, tokenizer_path, "--data_file", "rows.jsonl")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: rows.jsonl: Row 5 has no field 'output'; it has 'instruction', 'response'.\n"
    assert not (tmp_path / "data").exists()


def test_prepare_alpaca_without_a_network(tmp_path, tokenizer_path, python):
    result = run_prepare(python, tmp_path, tokenizer_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "error: Cannot download tatsu-lab/alpaca" in result.stderr and "--data_file" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "data").exists()


def test_real_alpaca_rows(shared, tmp_path):
    """With 999 real rows and the real tokenizer, every row is accounted for, and an epoch has little padding."""
    tokenizer = Tokenizer(shared / "models/llama2-tokenizer")
    style = get_prompt_style("alpaca")
    rows = [
        {"p": style.render(row["instruction"], row["input"]), "r": row["output"]}
        for row in read_rows(shared / "data/alpaca_en_demo.json")
    ]
    meta = prepare(tmp_path / "out", tokenizer, rows, max_seq_length=512, test_fraction=0.04)
    counts = meta["counts"]
    assert counts["rows"] == 999 == counts["empty"] + counts["too_long"] + counts["train"] + counts["test"]
    data = SFTData(tmp_path / "out", "train", tokenizer)
    assert padding_share(data.lengths, plan_epoch(data.lengths, 64, 4, seed=0, epoch=0)) <= 0.05
