"""Random command lines for every script that has settings: odd values, typos in names, mutated YAML, and combinations.

    python tests/campaign/flags.py --cases 1000

Each case is a valid command line with one to four random additions. The run must exit with 0, or with 1 or 2 and one
error line, and may change only its outputs. A script that would run for minutes gets an invalid value as its last
argument.
"""

import importlib
import json
import os
import random
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any, get_args

from deletion import ANSWER, CACHE, PREPARE
from harness import ROOT, Harness, changes, run_campaign, snapshot
from material import make_material

sys.path.append(str(ROOT))

from lit_llama.settings import Setting, describe
from lit_llama.storage.staging import TEMPORARY

TRAIN = "--checkpoint_dir in/base --out_dir out --accelerator cpu --max_steps 1 --batch_size 2 --micro_batch_size 2"
SFT, EVALUATE = f"{TRAIN} --data_dir in/sft --eval_rows 2", "--checkpoint_dir in/base --max_new_tokens 2 --limit 2"
COMPARE = f"{EVALUATE} --output_dir out --adapter in/adapter.safetensors"
LINES = {
    "evaluate/gsm8k.py": f"{EVALUATE} --data_file in/problems.json --output_dir out",
    "evaluate/microworld.py": "--checkpoint_dir in/base --questions 2 --groups unseen --output_file out.json",
    "evaluate/mmlu.py": f"{EVALUATE} --data_file in/mmlu.json --shots 0 --output_dir out",
    "evaluate/safety.py": f"{COMPARE} --data_file in/questions.json --judge keywords",
    "evaluate/vicuna.py": f"{COMPARE} --data_file in/questions.json",
    "finetune/aligner.py": SFT,
    "finetune/alignerDPO.py": f"{TRAIN} --data_dir in/pairs --eval_rows 2 --sample_prompts 0 --drift_prompts 0",
    "finetune/alignerRL.py": f"{TRAIN} --data_dir in/asks --eval_rows 2 --sample_prompts 0 --drift_prompts 0 "
    "--reward length --max_new_tokens 2 --group_size 2",
    "generate/aligner.py": f"{ANSWER} --adapter in/adapter.safetensors --output_file out.json",
    "generate/base.py": f"{ANSWER} --output_file out.json",
    "scripts/convert_checkpoint.py": "--checkpoint_dir in/meta --output_dir out",
    "scripts/convert_hf_checkpoint.py": "--checkpoint_dir in/hf --output_dir out",
    "scripts/inspect_aligner.py": "in/adapter.safetensors --plot out.png",
    "scripts/merge_aligner.py": "--checkpoint_dir in/base --adapter in/adapter.safetensors --output_dir out",
    "scripts/prepare_alpaca.py": f"--data_file in/rows.json --output_dir out {PREPARE}",
    "scripts/prepare_beaver_safe.py": f"--data_format preference --data_file in/pairs.jsonl --output_dir out {PREPARE}",
    "scripts/prepare_chat.py": f"--data_file in/chat.json --output_dir out --prompt_style alpaca {PREPARE}",
    "scripts/share.py": "--adapter in/adapter.safetensors --repo_id me/pirate --output_dir out --dry_run true",
    "scripts/prepare_metamath.py": f"--data_file in/solved.json --output_dir out {PREPARE}",
    "scripts/prepare_microworld.py": f"--split train --output_dir out {PREPARE}",
    "scripts/prepare_microworld_safe.py": f"--pairs 20 --output_dir out {PREPARE}",
}
SLOW = {"benchmarks": "--out_dir 1 --rounds 0", "studies": "--jobs 0", "microworld/pretrain.py": "--n_layer 0",
        "scripts/demo.py": "--questions 0", "benchmarks/dpo_memory.py": "--rows 0",
        "generate/serve.py": "--max_batch 0",
        "studies/analysis.py": "in/adapter.safetensors --out_dir out", "studies/paper_7b.py": "--limit 0"}  # fmt: skip
ENDLESS = {"epochs", "max_steps", "pair_epochs"}  # large values are valid but take too long
PROCESSES = {"devices", "num_nodes"}  # likewise: large values are valid but start many processes

INTS = ("-1", "0", "1", "2", "3", "7", "100", "007", "1_0", "0x10", str(2**31 - 1), str(2**31), str(2**32 - 1),
        str(2**32), str(2**63), str(-(2**63)), "1" + "0" * 30, "9" * 5001, "1e3", "1.0")  # fmt: skip
FLOATS = ("0", "-0.0", "0.5", "1", "2", "-1", "1e-38", "1e-320", "1e38", "1e308", "1e400", "nan", "inf", "-inf", ".nan",
          "-.inf", "9" * 400)  # fmt: skip
TEXTS = ("", " ", "x", "ü", "\u2028", "\u202e", "a" * 300, "a" * 5000, "-", "--", "{}", "{", "[", "[1, 2]", "null", "~",
         "true", "1", b"\xff", b"\xed\xa0\x80", "*", "&a", "%s", "\n", "\x1b[31m", "'", '"', "a: b", "!!int x",
         "&a [*a]", "{a: &a {b: *a}}", "alpaca", "plain", "orca", "cpu", "cuda", "mps", "auto", "32", "bf16", "base",
         "base+base:2")  # fmt: skip
PATHS = ("", ".", "..", "in", "in/base", "in/rows.json", "in/adapter.safetensors", "in/sft", "in/hf", "in/prompts.json",
         "nothing", "nothing/deep/er", "in/rows.json/x", "n" * 300, f"{'n' * 300}/x", "/dev/null", "/dev/zero", "new",
         "new.json", "/proc/self/mem", "a b/ü", "-", "in/base/lit_config.json", "x.safetensors", "x.pth", "x.parquet",
         "in/empty", b"\xff", "around")  # fmt: skip
YAML = (b"", b"null", b"1", b"- a", b"[1, 2", b"\t- x", b"? : :", b"&a [*a]", b"seed: &a {b: *a}", b"seed: *b", b"\xff",
        b"!!python/object/apply:os.system [touch pwned]", b"seed: !!python/name:os.system", b"{" * 3000, b"[" * 20000,
        b"seed: " + b"9" * 5001, b"seed: 1\nseed: 2", b"--- 1\n--- 2", b"seed: 2026-01-01", b"config: c.yaml", b"\0",
        b"seed:\n  a: 1", b"print_config: true", b"seed: !!binary aGk=", b"\xef\xbb\xbfseed: 1", b"<<: {seed: 1}",
        b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "seed: \u2028".encode(), b'"\\ud800": 1', b"1: 2", b"true: 1",
        b"seed: [1, [2, [3]]]", b"help: true", b"files: x")  # fmt: skip


@cache
def scripts() -> dict[str, list[Setting]]:
    """Return the settings of every script."""
    paths = sorted(path for path in ROOT.glob("*/*.py") if "    cli.run(main, " in path.read_text("utf-8"))
    names = [path.relative_to(ROOT).as_posix() for path in paths if path.parent.name != "tests"]
    return {name: describe(importlib.import_module(name[:-3].replace("/", ".")).Settings) for name in names}


def make_inputs(harness: Harness) -> Path:
    """Return a folder with the material, prepared data and questions."""
    folder = make_material(harness)
    if not (folder / "sft").exists():
        subjects = [{"question": "1 + 1?", "subject": "anatomy", "choices": list("1234"), "answer": 1}] * 2
        (folder / "mmlu.json").write_text(json.dumps(subjects))
        fields = {"category": "a", "text": "Who?", "prompt": "Who?"}
        (folder / "questions.json").write_text(json.dumps([{"question_id": i, **fields} for i in range(2)]))
        (folder / "empty").touch()
        for line, extra, name in (("scripts/prepare_alpaca.py", (), "sft"),
                                  ("scripts/prepare_alpaca.py", ("--stage", "rl"), "asks"),
                                  ("scripts/prepare_beaver_safe.py", (), "pairs")):  # fmt: skip
            words = LINES[line].replace("in/", "").replace("--output_dir out", f"--output_dir {name}").split()
            ended = harness.run(line, *words, *extra, cwd=folder)
            assert ended.code == 0, ended.describe()
        shutil.rmtree(folder / CACHE)
    return folder


def draw_value(rng: random.Random, setting: Setting) -> Any:
    """Return a value for a setting, usually of its type."""
    types = {setting.type, *get_args(setting.type)}
    pools = [pool for kind, pool in ((int, INTS), (float, FLOATS), (Path, PATHS)) if kind in types] or [TEXTS]
    if setting.type not in (int, float, str, Path) and rng.random() < 0.5:
        pools = [[str(arg) for arg in get_args(setting.type) if not isinstance(arg, type)] or TEXTS]
    pool = rng.choice((INTS, FLOATS, TEXTS, PATHS)) if rng.random() < 0.2 else rng.choice(pools)
    if setting.name in ENDLESS | PROCESSES:
        pool = ("-1", "0", "nan", "inf", "x", "1", "0.5", "", "1e-9")
    return rng.choice(pool)


def draw_words(rng: random.Random, settings: list[Setting], folder: Path) -> list[Any]:
    """Return the arguments of one mutation."""
    setting = rng.choice(settings)
    flag, kind = f"--{setting.name}", rng.random()
    if kind < 0.55:
        return [flag, *(draw_value(rng, setting) for _ in range(rng.choice((1, 1, 1, 2)) if setting.several else 1))]
    if kind < 0.62:  # mistyped
        place = rng.randrange(2, len(flag))
        return [flag[:place] + rng.choice(("", "x", "-", "=", "\n")) + flag[place + 1 :], draw_value(rng, setting)]
    if kind < 0.68:  # without a value
        return [flag]
    if kind < 0.74:
        return [flag, draw_value(rng, setting), flag, draw_value(rng, setting)]
    if kind < 0.78:
        return [rng.choice(TEXTS)]
    if kind < 0.81:
        return [rng.choice(("--print_config", "--help", "--config", "-h", "--", "--config=", "--print_config=x"))]
    return ["--config", draw_yaml(rng, settings, folder)]


def draw_yaml(rng: random.Random, settings: list[Setting], folder: Path) -> Any:
    """Write a YAML file and return its path, or return the path of something else."""
    if rng.random() < 0.15:
        return rng.choice(PATHS)
    lines = []
    for setting in rng.sample(settings, min(3, len(settings))):
        value = draw_value(rng, setting)
        lines.append(setting.name.encode() + b": " + (value if isinstance(value, bytes) else value.encode()))
    text = b"\n".join(lines) if rng.random() < 0.6 else rng.choice(YAML)
    if text and rng.random() < 0.3:
        place = rng.randrange(len(text))
        text = text[:place] + rng.randbytes(1) + text[place + rng.randint(0, 2) :]
    (folder / "c.yaml").write_bytes(text)
    return "c.yaml"


def check(harness: Harness, rng: random.Random, folder: Path) -> str:
    script = rng.choice(list(scripts()))
    settings, work = scripts()[script], folder / "work"
    shutil.copytree(make_inputs(harness), work / "in")
    (work / "around").mkdir()
    for path in (work / "around/thesis.tex", work / "summary.json", folder / "thesis.tex"):
        path.write_text("years of work")
    words: list[Any] = LINES.get(script, SFT if script.startswith("finetune") else "").split()
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        words += draw_words(rng, settings, work)
    slow = SLOW.get(script, SLOW.get(script.partition("/")[0], ""))
    words += slow.split()
    words = [word.replace(b"\0", b"") if isinstance(word, bytes) else word.replace("\0", "") for word in words]
    before = snapshot(folder)
    offline = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    ended = harness.run(script, *words, cwd=work, env=offline, limit=180)
    if ended.problem:
        return f"{ended.problem}: {ended.describe()}"
    if slow.endswith(" 0") and ended.code == 0 and not {"--help", "-h", "--print_config"} & set(words):
        return f"an impossible value is accepted: {ended.describe()}"
    named = {os.path.normpath(f"work/{word}") for word in words if isinstance(word, str)} if replaces(words) else set()
    lost = [text for text in changes(before, snapshot(folder)) if text.split(" ")[0] not in named]
    lost = [text for text in lost if not Path(text.split(" ")[0]).is_dir()]
    leftovers = [name for name in snapshot(folder) if TEMPORARY in name and CACHE not in name]
    return f"{(lost + leftovers)[0]}: {ended.describe()}" if lost + leftovers else ""


def replaces(words: list[Any]) -> bool:
    """Return whether a command line or its YAML file may permit replacing files."""
    return any("--overwrite" in str(word) or word in ("--config", "c.yaml") for word in words)


if __name__ == "__main__":
    run_campaign(check, __doc__)
