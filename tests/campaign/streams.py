"""Standard streams in every state: closed, full, broken pipes, invalid text; for --help, answers, chats, tables.

    python tests/campaign/streams.py --cases 200

A run must end without a traceback. It succeeds unless standard output is full, and exits with 141 for a broken pipe.
"""

import random
import shutil
import sys
from pathlib import Path

from harness import ROOT, Harness, run_campaign
from material import make_material

SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for room in ("evaluate", "finetune", "generate", "microworld", "scripts")
    for path in (ROOT / room).glob("*.py")
    if "    cli.run(main, " in path.read_text(encoding="utf-8")
)
BASE = "--checkpoint_dir in/base --max_new_tokens 3"
CALLS = (
    f"generate/base.py {BASE}",
    f"generate/base.py {BASE} --interactive",
    f"generate/aligner.py {BASE} --adapter in/adapter.safetensors",
    f"generate/aligner.py {BASE} --adapter in/adapter.safetensors --interactive --temperature 1",
    "scripts/inspect_aligner.py in/adapter.safetensors",
    "scripts/count_parameters.py",
    "scripts/prepare_microworld_safe.py --checkpoint_dir in/base --pairs 20 --num_proc 1 --output_dir out",
    "scripts/convert_checkpoint.py --checkpoint_dir in/meta --output_dir out",
    "evaluate/microworld.py --checkpoint_dir in/base --questions 2 --groups unseen",
)
LINES = (b"Who?", b"", b"caf\xe9", "Wo wohnt ülp?".encode(), b"\x1b[31mred\x07", b"\xff\xfe", b"x" * 300,
         b"\xed\xa0\x80", "a\u2028b".encode(), b"a\r", b"\0")  # fmt: skip
OUTPUT_STATES = ("closed", "broken", *(["full"] if Path("/dev/full").exists() else []))  # macOS has no /dev/full
STATES = {"stdin": ("closed",), "stdout": OUTPUT_STATES, "stderr": OUTPUT_STATES}


def check(harness: Harness, rng: random.Random, folder: Path) -> str:
    shutil.copytree(make_material(harness), folder / "in")
    call = f"{rng.choice(SCRIPTS)} --help" if rng.random() < 0.3 else rng.choice(CALLS)
    words: list[object] = list(call.split())
    odd = False
    if "generate" in call and rng.random() < 0.5:
        odd = bool(prompt := rng.choice(LINES).replace(b"\0", b"")) and not is_text(prompt)
        words += ["--prompt", prompt]
    names = [name for name in STATES if rng.random() < 0.5]
    streams = {name: rng.choice(STATES[name]) for name in names}
    stdin = b"\n".join(rng.choices(LINES, k=rng.randint(0, 4))) + rng.choice((b"", b"\n"))
    ended = harness.run(words[0], *words[1:], cwd=folder, stdin=stdin, streams=streams)
    if ended.problem:
        return f"{ended.problem} with {streams}: {ended.describe()}"
    expected = {0}
    if "broken" in streams.values():
        expected |= {141}
    if streams.get("stdout") == "full" or (streams.get("stdin") == "closed" and "--interactive" in call):
        expected |= {1}
    if "--prompt" in words:
        expected |= {1}  # an empty prompt, or bytes that are not text
    if odd and "--help" not in call:
        expected -= {0}
    return "" if ended.code in expected else f"unexpected end with {streams}: {ended.describe()}"


def is_text(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


if __name__ == "__main__":
    sys.path.append(str(ROOT))
    run_campaign(check, __doc__)
