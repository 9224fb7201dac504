"""Malicious pickles in place of every file: none is executed, and each is refused with one error line.

python tests/campaign/pickles.py --cases 500
"""

import io
import pickle
import random
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

from fuzz import ALPACA, BASE, DPO, FORMATS, FROM_HF, FROM_META, SFT, TO_HF, make_inputs
from harness import ROOT, Harness, run_campaign

MARK = "executed"
MERGE = "scripts/merge_aligner.py --checkpoint_dir pth --output_dir out --adapter run"
WAYS_IN: dict[str, tuple[str, ...]] = {
    "pth/lit-llama.pth": ("generate/base.py --checkpoint_dir pth", TO_HF.replace("tiny", "pth"), MERGE),
    "tiny/lit_model.safetensors": (f"generate/base.py {BASE}", TO_HF),
    "bin/pytorch_model.bin": (FROM_HF.replace("hf --", "bin --"),),
    "meta/consolidated.00.pth": (FROM_META,),
    "one/model.safetensors": (FROM_HF.replace("hf --", "one --"),),
    "a.pth": FORMATS["pickled adapter"].calls,
    "a.safetensors": FORMATS["adapter"].calls,
    "bank.safetensors": FORMATS["bank"].calls,
    "tiny/tokenizer.model": (f"generate/base.py {BASE}", FROM_META.replace("meta", "meta --tokenizer_dir tiny")),
    "json/tokenizer.json": ("generate/base.py --checkpoint_dir json",),
    "tiny/lit_config.json": (f"generate/base.py {BASE}",),
    "data/train/data-00000-of-00001.arrow": (f"{SFT} --out_dir new --max_steps 1",),
    "data/train/state.json": (f"{SFT} --out_dir new --max_steps 1",),
    "pairs/train/dataset_info.json": (f"{DPO} --out_dir new --max_steps 1",),
    "data/meta.json": (f"{SFT} --out_dir new --max_steps 1",),
    "rows.parquet": (f"{ALPACA} rows.parquet",),
    "rows.json": (f"{ALPACA} rows.json",),
    "sft.yaml": (f"{SFT} --out_dir new --max_steps 1 --config sft.yaml",),
    "run/state.pt": (f"{SFT} --out_dir run --max_steps 4 --resume",),
    "dpo/state.pt": (f"{DPO} --out_dir dpo --max_steps 4 --resume",),
}


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def make_pickle(rng: random.Random, original: bytes, mark: Path) -> bytes:
    """Return a pickle, in one of torch's file formats, that creates the file `mark` if it is executed."""
    import os

    import torch

    run = f"open({str(mark)!r}, 'w').close()"
    inner = io.BytesIO()
    torch.save({"x": Call(exec, run)}, inner)
    payload = rng.choice((
        Call(exec, run), Call(eval, f"exec({run!r})"), Call(os.system, f"touch {mark}"),
        Call(torch.storage._load_from_bytes, inner.getvalue()),  # loads without restrictions
        Call(getattr, Call(__import__, "os"), "system"), Call(os.mknod, str(mark)),
        Call(torch.serialization.load, str(mark.parent / "inner.pt")),
    ))  # fmt: skip
    (mark.parent / "inner.pt").write_bytes(inner.getvalue())
    value = rng.choice((payload, {"x": payload}, {"x": torch.ones(2), "y": [payload]}, [payload]))
    kind, file = rng.choice(("zip", "legacy", "bare", "patched", "text")), io.BytesIO()
    if kind in ("zip", "legacy"):
        torch.save(value, file, _use_new_zipfile_serialization=kind == "zip")
    elif kind == "bare":
        pickle.dump(value, file, protocol=rng.randint(0, 5))
    elif kind == "text":  # for YAML readers
        file.write(rng.choice((f'seed: !!python/object/apply:os.system ["touch {mark}"]\n',
                               f"!!python/object/apply:builtins.exec [{run!r}]\n")).encode())  # fmt: skip
    else:
        torch.save({"x": torch.ones(2)}, file)
        with zipfile.ZipFile(file) as source, zipfile.ZipFile(new := io.BytesIO(), "w", zipfile.ZIP_STORED) as target:
            for item in source.infolist():
                data = pickle.dumps(value, 2) if item.filename.endswith("data.pkl") else source.read(item)
                target.writestr(item, data)
        file = new
    prefix = original[: rng.choice((0, 0, 0, 8, len(original)))]  # after the beginning of a valid file
    return prefix + file.getvalue()


def check(harness: Harness, rng: random.Random, folder: Path, only: list[str] | None = None) -> str:
    shutil.copytree(make_inputs(harness), folder, dirs_exist_ok=True, copy_function=shutil.copy)
    name = rng.choice(only or list(WAYS_IN))
    path, mark = folder / name, folder / MARK
    original = path.read_bytes()
    path.write_bytes(make_pickle(rng, original, mark))
    is_appended = path.read_bytes().startswith(original)  # some formats permit trailing data
    call = rng.choice(WAYS_IN[name]).replace("FILE", name)
    ended = harness.run(*call.split(), cwd=folder, limit=60, quick=True)
    if mark.exists():
        return f"{name} was executed: {ended.describe()}"
    if ended.problem or (ended.code == 0 and not is_appended):
        return f"{ended.problem or 'not refused'}: {name}\n{ended.describe()}"
    return ""


if __name__ == "__main__":
    sys.path.append(str(ROOT))
    run_campaign(check, __doc__, kinds=tuple(WAYS_IN))
