"""Files of other users: unreadable inputs, unwritable outputs and read-only caches, for a user who is not root.

    python tests/campaign/permissions.py --cases 100

Each case is a valid command line, run by another user after one permission was removed. It must exit with 0 if the file
does not matter, else with 1 and one error line, and must change only files that it wrote.
"""

import atexit
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import Harness, changes, run_campaign, snapshot

NOBODY = 65534
if os.geteuid() == 0:
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="campaign-home-")
    os.chmod(os.environ["HF_HOME"], 0o777)
    atexit.register(shutil.rmtree, os.environ["HF_HOME"])

from deletion import CACHE
from flags import LINES, SFT, make_inputs

from lit_llama.storage.cache import FILES
from lit_llama.storage.manifest import MANIFEST

MORE = {f"finetune/{name}.py": SFT for name in ("lora", "bitfit")}
MORE |= {"finetune/aligner.py": f"{SFT} --init_adapter in/adapter.safetensors --config c.yaml"}
SCRIPTS = {name: words for name, words in {**LINES, **MORE}.items() if not name.startswith("studies")}

# the other user may have no access to Python's files, so everything is imported first
IMPORTS = ("encodings.utf_8_sig", "encodings.raw_unicode_escape", "sentencepiece.sentencepiece_model_pb2", "matplotlib",
           *(name[:-3].replace("/", ".") for name in SCRIPTS))  # fmt: skip


def check(harness: Harness, rng: random.Random, folder: Path) -> str:
    script = rng.choice(list(SCRIPTS))
    work, words = folder / "work", SCRIPTS[script].split()
    shutil.copytree(make_inputs(harness), work / "in")
    (work / "c.yaml").write_text("seed: 1\n")
    for path in (folder, work):
        os.chmod(path, 0o755)
    os.chown(work, NOBODY, NOBODY)
    kind = rng.choice((unreadable, unreadable, unreadable, unwritable, of_others))
    needed = kind(rng, work, words)
    before = snapshot(work)
    ended = harness.run(script, *words, cwd=work, user=NOBODY, env={"HOME": str(work)}, limit=180)
    case = f"{kind.__name__} {needed}"
    if ended.problem:
        return f"{case}: {ended.problem}: {ended.describe()}"
    after = snapshot(work)
    if lost := changes(before, after):
        return f"{case}: {lost[0]}: {ended.describe()}"
    new = [name for name in sorted(after.keys() - before.keys()) if not is_empty(work / name)]
    if ended.code and new:
        return f"{case}: a refusal left {new[0]}: {ended.describe()}"
    return "" if ended.code or not needed.startswith("!") else f"{case}: is ignored: {ended.describe()}"


def is_empty(path: Path) -> bool:
    """Return whether a failed run may leave this path: part of a cache or a folder with nothing but a manifest."""
    return path.is_dir() or path.name in (MANIFEST, *FILES) or CACHE in path.parts


def unreadable(rng: random.Random, work: Path, words: list[Any]) -> str:
    """Make a named input, or something in a named folder, unreadable."""
    path = work / rng.choice([word for word in words if word.startswith(("in/", "c.yaml"))])
    named = path.is_file() or rng.random() < 0.4
    if not named:
        path = rng.choice(sorted(path.rglob("*")))
    os.chmod(path, 0)
    return f"{'!' if named else ''}{path.relative_to(work)}"


def unwritable(rng: random.Random, work: Path, words: list[Any]) -> str:
    """Make the folder of the output and the cache unwritable."""
    os.chown(work, 0, 0)
    return "!work" if {"--output_dir", "--output_file", "--out_dir", "--plot"} & set(words) else "work"


def of_others(rng: random.Random, work: Path, words: list[Any]) -> str:
    """Put a file or folder of another user where the output or the cache will be."""
    name = rng.choice(("out", "out.json", "out.png", ".aligner-cache"))
    if "." in name[1:]:
        (work / name).write_text("years of work")
        words += ["--overwrite", "true"] if "--output_file" in words else []
    else:
        (work / name).mkdir(mode=0o755)
    return f"{'!' if name in words else ''}{name}"


if __name__ == "__main__":
    if os.geteuid() != 0:
        print("0 cases: only root can run scripts as another user")
        sys.exit()
    run_campaign(check, __doc__, IMPORTS)
