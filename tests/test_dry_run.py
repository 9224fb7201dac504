"""--dry_run of the finetuning scripts."""

import re

import pytest

from lit_llama.data import PreferenceData, SFTData

TRAIN = ("--epochs", "2", "--batch_size", "8", "--micro_batch_size", "4", "--adapter_start_layer", "1")


def files(folder):
    return sorted(path for path in folder.rglob("*"))


@pytest.mark.parametrize(("script", "more"), [
    ("aligner", ()), ("aligner", ("--quantize", "int8", "--gradient_checkpointing")), ("lora", ()),
    ("adapter_v2", ("--precision", "bf16-true")),
])  # fmt: skip
def test_sft_prints_the_plan_and_writes_nothing(script, more, base_dir, data_dir, tmp_path, run_script):
    if "--quantize" in more:
        pytest.importorskip("bitsandbytes")
    flags = TRAIN if script in ("aligner", "adapter_v2") else TRAIN[:-2]
    paths = ("--checkpoint_dir", base_dir, "--data_dir", data_dir, "--out_dir", tmp_path / "out")
    code, out, err = run_script(f"finetune/{script}.py", *paths, *flags, "--accelerator", "cpu", "--dry_run", *more)
    assert code == 0, err
    assert files(tmp_path) == []
    data = SFTData(data_dir, "train")
    assert re.search(rf"^parameters   [\d,]+ frozen in \w+.*, [\d,]+ trained \({script}\)$", out, re.MULTILINE)
    assert f"data         {len(data)} rows, up to {data.lengths.max()} tokens\n" in out
    assert "steps        12 of 8 rows on 1 process(es), 6 an epoch\n" in out
    assert f"| a step, 4 × {data.lengths.max()} tokens | " in out
    assert re.search(r"^time         \S+ s for a step, measured; about \d:\d\d:\d\d for 12 steps", out, re.MULTILINE)
    assert out.endswith(f"nothing was written to {tmp_path / 'out'}\n")


def test_dpo_computes_no_reference(base_dir, preference_dir, tmp_path, run_script):
    before = files(preference_dir.parent)
    paths = ("--checkpoint_dir", base_dir, "--data_dir", preference_dir, "--out_dir", tmp_path / "out")
    code, out, err = run_script("finetune/alignerDPO.py", *paths, *TRAIN, "--accelerator", "cpu", "--dry_run")
    assert code == 0, err
    assert files(tmp_path) == [] and files(preference_dir.parent) == before
    longest = PreferenceData(preference_dir, "train").lengths.max()
    assert f"| a step, 8 × {longest} tokens | " in out  # two sequences per pair
    assert "about 0:00:0" in out


def test_pairs_that_share_a_row(base_dir, preference_dir, tmp_path, run_script, monkeypatch):
    paths = ("--checkpoint_dir", base_dir, "--data_dir", preference_dir, "--out_dir", tmp_path / "out")
    monkeypatch.setattr("lit_llama.packing.answers_per_row", lambda *args: 2)
    code, out, err = run_script("finetune/alignerDPO.py", *paths, *TRAIN, "--accelerator", "cpu", "--dry_run")
    assert code == 0, err
    rows = PreferenceData(preference_dir, "train").rows
    longest = max(len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) + 1 for row in rows)
    assert f"| a step, 4 × {longest} tokens | " in out


def test_a_folder_with_a_run_is_unchanged(base_dir, data_dir, tmp_path, run_script):
    flags = ("--checkpoint_dir", base_dir, "--data_dir", data_dir, "--out_dir", tmp_path / "out", *TRAIN)
    assert run_script("finetune/aligner.py", *flags, "--max_steps", "2", "--accelerator", "cpu")[0] == 0
    before = {path: path.read_bytes() for path in files(tmp_path) if path.is_file()}
    assert run_script("finetune/aligner.py", *flags, "--accelerator", "cpu", "--dry_run")[0] == 0
    assert {path: path.read_bytes() for path in files(tmp_path) if path.is_file()} == before
