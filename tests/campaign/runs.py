"""A tiny base, its data, and short training runs for campaigns, with checks of the files that a run writes."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from harness import ROOT, Ended, Harness

sys.path.append(str(ROOT))

import torch

from lit_llama.checkpoint import save_base
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.run.report import read_metrics
from lit_llama.storage.staging import TEMPORARY

COMMON = ("--batch_size 6 --micro_batch_size 3 --max_steps 4 --epochs 9 --warmup_epochs 0 --adapter_start_layer 1 "
          "--eval_interval 2 --save_interval 2 --sample_prompts 1 --max_new_tokens 2 --accelerator cpu "
          "--checkpoint_dir {0}/base --out_dir out")  # fmt: skip
KINDS = {
    "sft": ("finetune/aligner.py", f"{COMMON} --data_dir {{0}}/rows"),
    "dpo": ("finetune/alignerDPO.py", f"{COMMON} --data_dir {{0}}/pairs --drift_prompts 1"),
}
OTHER = ("--learning_rate", "0.01")  # the setting of the run that is overwritten


class Runs:
    """Runs of one kind, which write to `out` in a sandbox.

    Args:
        kind: A key of `KINDS`.
    """

    def __init__(self, harness: Harness, kind: str) -> None:
        self.harness, self.kind = harness, kind
        self.script, flags = KINDS[kind]
        self.flags = flags.format(make_material(harness)).split()

    def run(self, folder: Path, *flags: object, **options: Any) -> Ended:
        """Run the script in a sandbox.

        Raises:
            AssertionError: It crashed.
        """
        ended = self.harness.run(self.script, *self.flags, *flags, cwd=folder, **options)
        assert not ended.problem, f"{ended.problem}: {ended.describe()}"
        return ended

    def finish(self, folder: Path, *flags: object) -> None:
        ended = self.run(folder, *flags)
        assert ended.code == 0, f"lost: {ended.describe()}"

    def check_result(self, folder: Path, *flags: object) -> None:
        """Check that a sandbox contains the files of an undisturbed run."""
        actual, expected = read_result(folder / "out"), read_result(self.undisturbed(*flags) / "out")
        different = [name for name in {**expected, **actual} if actual.get(name) != expected.get(name)]
        assert not different, f"{', '.join(different)} differ from those of an undisturbed run"

    def undisturbed(self, *flags: object) -> Path:
        """Return the sandbox of an undisturbed run."""
        return self.kept("-".join(map(str, ("whole", *flags))), lambda folder: self.finish(folder, *flags))

    def kept(self, name: str, make: Any) -> Path:
        """Return a sandbox, which is created on first use."""
        folder = self.harness.folder / f"{self.kind}-{name}"
        if not folder.exists():
            folder.mkdir()
            make(folder)
        return folder


def read_result(out: Path) -> dict[str, Any]:
    """Return the contents of a finished run's files by name, without timings."""
    result: dict[str, Any] = {name: (out / name).read_bytes() for name in ("samples.jsonl", "config.yaml")}
    result |= {name: (out / name).read_bytes() for name in ("best.safetensors", "last.safetensors")}
    result["metrics.csv"] = {
        step: {name: value for name, value in row.items() if name != "tokens_per_s"}
        for step, row in read_metrics(out / "metrics.csv").items()
    }
    summary = json.loads((out / "summary.json").read_text())
    result["summary.json"] = {name: value for name, value in summary.items() if name not in ("seconds", "tokens_per_s")}
    state = torch.load(out / "state.pt", weights_only=True)
    result["state.pt"] = to_lists({name: value for name, value in state.items() if name not in ("seconds",)})
    others = {*result, "loss.png", "metrics.png", "environment.json", ".aligner-lock", ".aligner-manifest.json"}
    result["other files"] = sorted(path.name for path in out.iterdir() if path.name not in others)
    result["TensorBoard logs"] = len(os.listdir(out / "tensorboard"))
    return result


def to_lists(value: Any) -> Any:
    """Return a value with tensors as lists, so that it can be compared."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: to_lists(part) for name, part in value.items()}
    return [to_lists(part) for part in value] if isinstance(value, list | tuple) else value


def left_temporaries(folder: Path) -> list[Path]:
    return list(folder.rglob(f"{TEMPORARY}*"))


def make_material(harness: Harness) -> Path:
    """Return a folder with a base of three layers and prepared rows and pairs. It is created once per harness."""
    folder = harness.folder / "runs"
    if folder.exists():
        return folder
    folder.mkdir()
    tokenizer = ROOT / "checkpoints/microworld/tokenizer.model"
    shape = dict(vocab_size=2048, n_layer=3, n_head=4, n_embd=32, intermediate_size=48, block_size=96)
    network, generator = LLaMA(LLaMAConfig(**shape)), torch.Generator().manual_seed(0)
    save_base(folder / "base", network.config, {name: 0.2 * torch.randn(p.shape, generator=generator)
                                                for name, p in network.named_parameters()})  # fmt: skip
    shutil.copy(tokenizer, folder / "base")
    # str.splitlines splits at U+2028 and similar characters, but they do not end a line of JSON
    names = ["cat", "dog\u2028", "rat\u2029", "hat\x85", "mat"]
    rows = [{"instruction": f"Name {n} {i}.", "output": f"A {n}, {i} times."} for i in range(3) for n in names]
    pairs = [{"prompt": f"Name {n} {i}.", "chosen": f"A {n}.", "rejected": "No."} for i in range(3) for n in names]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    flags = ("--checkpoint_dir", folder / "base", "--num_proc", 1, "--max_seq_length", 90, "--test_fraction", 0.2)
    for script, data, more in (("prepare_alpaca", "rows.json", ()),
                               ("prepare_beaver_safe", "pairs.jsonl", ("--data_format", "preference"))):  # fmt: skip
        name = Path(data).stem
        ended = harness.run(f"scripts/{script}.py", "--data_file", folder / data, "--output_dir", folder / name, *flags,
                            *more, cwd=folder)  # fmt: skip
        assert ended.code == 0, ended.describe()
    return folder
