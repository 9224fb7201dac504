"""Damaged inputs of every format: a valid answer or one error line, never a traceback, hang, abort or partial output.

    python tests/campaign/fuzz.py --cases 2000
    python tests/campaign/fuzz.py --cases 100 --only adapter "pickled adapter"

Each case damages one file (tests/campaign/mutate.py) and runs a script that reads it.
"""

import atexit
import contextlib
import gzip
import json
import os
import random
import re
import shutil
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness import ROOT, Harness, run_campaign
from material import make_material
from mutate import mutate

sys.path += [str(ROOT), str(ROOT / "tests")]

BASE = "--checkpoint_dir tiny --max_new_tokens 2"
TRAIN = (
    "--accelerator cpu --batch_size 2 --micro_batch_size 2 --save_interval 1 --eval_interval 1 --sample_prompts 1 "
    "--max_new_tokens 3"
)
SFT = f"finetune/aligner.py --checkpoint_dir tiny --data_dir data --adapter_start_layer 0 {TRAIN}"
DPO = f"finetune/alignerDPO.py --checkpoint_dir tiny --data_dir pairs --init_adapter run {TRAIN} --drift_prompts 1"
RL = (f"finetune/alignerRL.py --checkpoint_dir tiny --data_dir asks --adapter_start_layer 0 {TRAIN} --drift_prompts 1 "
      "--reward length --group_size 2")  # fmt: skip
PREPARE = "--checkpoint_dir tiny --num_proc 1 --max_seq_length 64 --test_fraction 0.3 --output_dir out"
ALPACA = f"scripts/prepare_alpaca.py {PREPARE} --data_file"
CHAT = f"scripts/prepare_chat.py {PREPARE} --checkpoint_dir chatty --data_file"
TEMPLATE = """{% for m in messages %}{{ '<s>' if m.role == 'user' }}[{{ m.role }}]{{ m.content }}{{ '</s>\\n' }}
{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"""
VICUNA = ("evaluate/vicuna.py --judge_model m --judge_workers 1 --judge_retries 0 --limit 2 --checkpoint_dir tiny "
          "--max_new_tokens 2 --adapter run --data_file vicuna.jsonl")  # fmt: skip
FROM_HF = "scripts/convert_hf_checkpoint.py --checkpoint_dir hf --output_dir out"
FROM_META = "scripts/convert_checkpoint.py --checkpoint_dir meta --output_dir out"
TO_HF = "scripts/convert_hf_checkpoint.py --reverse --checkpoint_dir tiny --output_dir out"


@dataclass(frozen=True)
class Format:
    """A kind of file that the project reads.

    Attributes:
        files: Glob patterns of such files in the material.
        calls: Commands that read them; "FILE" is replaced by the path. Their outputs are named `out`.
        fails: Whether a damaged file may cause an error. (A damaged cache is recomputed.)
        weight: Relative frequency of this kind of case; preference training takes ten times as long.
    """

    files: tuple[str, ...]
    calls: tuple[str, ...]
    fails: bool = True
    weight: float = 1.0


STATE = ("run/state.pt", "run/metrics.csv", "run/samples.jsonl")
ADAPTER_CALLS = (
    f"generate/aligner.py {BASE} --prompt Who? --adapter FILE",
    "scripts/inspect_aligner.py FILE --plot out.png",
    "scripts/inspect_aligner.py FILE --to_safetensors out.safetensors",
    "scripts/merge_aligner.py --checkpoint_dir tiny --output_dir out --adapter FILE",
    "scripts/share.py --dry_run --repo_id me/x --output_dir out --adapter FILE",
    f"generate/aligner.py {BASE} --prompt Who? --use a --bank a.safetensors FILE",
    f"generate/aligner.py {BASE} --prompt Who? --strength 0.5 --output_file out.json --adapter FILE",
    f"{SFT} --out_dir new --max_steps 1 --init_adapter FILE",
)
FORMATS = {
    "lit_config.json": Format(("tiny/lit_config.json",), (
        f"generate/base.py {BASE}", "scripts/merge_aligner.py --checkpoint_dir tiny --output_dir out --adapter run",
        TO_HF,
    )),
    "config.json": Format(("hf/config.json",), (FROM_HF,)),
    "params.json": Format(("meta/params.json",), (FROM_META,)),
    "weights": Format(("tiny/lit_model.safetensors",), (
        f"generate/base.py {BASE}", TO_HF,
        "scripts/merge_aligner.py --checkpoint_dir tiny --output_dir out --adapter run",
    )),
    "hf weights": Format(("hf/*.safetensors", "hf/*.index.json"), (FROM_HF,)),
    "pickled weights": Format(("pth/lit-llama.pth", "bin/pytorch_model.bin", "meta/consolidated.00.pth"), (
        "generate/base.py --checkpoint_dir pth --max_new_tokens 2",
        "scripts/convert_hf_checkpoint.py --checkpoint_dir bin --output_dir out", FROM_META,
    )),
    "tokenizer.model": Format(("tiny/tokenizer.model",), (
        f"generate/base.py {BASE}", f"{ALPACA} rows.json",
        TO_HF,
    )),
    "tokenizer.json": Format(("json/tokenizer.json", "json/tokenizer_config.json", "json/generation_config.json"), (
        "generate/base.py --checkpoint_dir json --max_new_tokens 2", f"{ALPACA} rows.json --checkpoint_dir json",
    )),
    "adapter": Format(("a.safetensors", "lora.safetensors"), ADAPTER_CALLS),
    "pickled adapter": Format(("a.pth",), ADAPTER_CALLS),
    "bank": Format(("bank.safetensors",), (
        f"generate/aligner.py {BASE} --prompt Who? --use one --bank FILE",
        f"generate/aligner.py {BASE} --prompt Who? --use one+two:0.5 --compare_base --bank FILE",
        f"generate/aligner.py {BASE} --output_file out.json --prompt_file prompts.json --bank FILE",
    )),
    "dataset": Format(("data/meta.json", "data/t*/*", "data/.aligner-manifest.json"), (
        f"{SFT} --out_dir new --max_steps 1", f"{ALPACA} rows.json --output_dir data",
    )),
    "preferences": Format(("pairs/meta.json", "pairs/t*/*"), (f"{DPO} --out_dir new --max_steps 1",), weight=0.3),
    "cache": Format((".aligner-cache/*/*", ".aligner-cache/README"), (
        f"{ALPACA} rows.json", f"{DPO} --out_dir new --max_steps 1",
    ), fails=False, weight=0.5),
    "rows": Format(("rows.json", "rows.jsonl", "rows.parquet", "rows.jsonl.gz"), (f"{ALPACA} FILE",)),
    "conversations": Format(("chat.json", "chat.jsonl"), (
        f"{CHAT} FILE", f"{CHAT} FILE --checkpoint_dir tiny --prompt_style alpaca", f"{CHAT} FILE --train_on last",
    )),
    "chat template": Format(("chatty/chat_template.jinja", "chatty/tokenizer_config.json"), (
        f"{CHAT} chat.json", "generate/base.py --checkpoint_dir chatty --max_new_tokens 2 --prompt_style chat",
        "scripts/convert_hf_checkpoint.py --reverse --checkpoint_dir chatty --output_dir out",
    )),
    "pairs": Format(("pairs.jsonl",), (
        f"scripts/prepare_beaver_safe.py --data_format preference {PREPARE} --data_file FILE",
    )),
    "config": Format(("sft.yaml", "answer.yaml"), (
        f"{SFT} --out_dir new --max_steps 1 --config sft.yaml", f"generate/base.py {BASE} --config answer.yaml",
    )),
    "prompts": Format(("prompts.json", "prompts.jsonl", "prompts.txt"), (
        f"generate/base.py {BASE} --output_file out.json --prompt_file FILE",
        f"generate/aligner.py {BASE} --bank bank.safetensors --prompt_file FILE",
    )),
    "finished run": Format(("whole-*/state.pt", "whole-*/metrics.csv", "whole-*/samples.jsonl"), (
        f"{SFT} --out_dir whole-run --max_steps 4 --resume", f"{DPO} --out_dir whole-dpo --max_steps 4 --resume",
        f"{RL} --out_dir whole-rl --max_steps 4 --resume",
    ), weight=0.5),
    "run": Format((*STATE, "run/*.safetensors", "run/.aligner-manifest.json"), (
        f"{SFT} --out_dir run --max_steps 4 --resume", f"{SFT} --out_dir run --max_steps 4 --overwrite",
    )),
    "DPO run": Format(("dpo/state.pt", "dpo/metrics.csv", "dpo/samples.jsonl", "dpo/*.safetensors"), (
        f"{DPO} --out_dir dpo --max_steps 4 --resume",
    ), weight=0.3),
    "prompt data": Format(("asks/meta.json", "asks/t*/*"), (f"{RL} --out_dir new --max_steps 1",), weight=0.4),
    "RL run": Format(("rl/state.pt", "rl/metrics.csv", "rl/samples.jsonl", "rl/*.safetensors"), (
        f"{RL} --out_dir rl --max_steps 4 --resume",
    ), weight=0.4),
    "questions": Format(("problems.json", "mmlu/*.csv", "mmlu.zip", "vicuna.jsonl", "labelled.csv"), (
        "evaluate/gsm8k.py --checkpoint_dir tiny --max_new_tokens 2 --output_dir asked --data_file problems.json",
        "evaluate/mmlu.py --checkpoint_dir tiny --output_dir asked --shots 1 --data_file mmlu",
        "evaluate/mmlu.py --checkpoint_dir tiny --output_dir asked --shots 0 --data_file mmlu.zip",
        f"{VICUNA} --output_dir asked",
        "evaluate/safety.py --judge keywords --calibrate labelled.csv --output_dir asked --checkpoint_dir tiny",
    )),
    "evaluation": Format(("gsm8k/*.json*", "gsm8k/.aligner-manifest.json", "judged/*.jsonl", "judged/*/*.jsonl"), (
        "evaluate/gsm8k.py --checkpoint_dir tiny --max_new_tokens 2 --output_dir gsm8k --data_file problems.json",
        f"{VICUNA} --output_dir judged",
    )),
    "judge": Format(("reply.json",), (
        f"{VICUNA} --output_dir asked --judge_url URL",
    )),
}  # fmt: skip
COUNTS: Counter = Counter()


def check(harness: Harness, rng: random.Random, folder: Path, only: list[str] | None = None) -> str:
    material = make_inputs(harness)
    names = only or list(FORMATS)
    name = rng.choices(names, [FORMATS[name].weight for name in names])[0]
    format = FORMATS[name]
    files = sorted(path for pattern in format.files for path in material.glob(pattern) if path.is_file())
    relative = rng.choice(files).relative_to(material)
    calls = [call for call in format.calls if "FILE" in call or reads(call, relative)] or list(format.calls)
    call = rng.choice(calls).replace("FILE", str(relative))
    for entry in {relative.parts[0], ".aligner-cache", *(word.split("/")[0] for word in call.split())}:
        if (material / entry).is_dir():
            shutil.copytree(material / entry, folder / entry, copy_function=shutil.copy)
        elif (material / entry).is_file():
            shutil.copy(material / entry, folder)
    path = folder / relative
    others = [
        file.read_bytes() for file in sorted(material.glob("*.*")) if file.is_file() and file.suffix != path.suffix
    ]
    kind, content = mutate(rng, path.read_bytes(), path.suffix, others)
    special = rng.random() < 0.06
    if special:
        kind = replace_by_special(rng, path)
    else:
        path.write_bytes(content)
    for place in (folder, folder / "run", folder / "gsm8k"):
        if place.is_dir():
            (place / "thesis.tex").write_text("years of work")
    before = identify(folder)
    if "URL" in call:
        with replying(content) as url:
            ended = harness.run(*call.replace("URL", url).split(), cwd=folder, limit=60, memory=2**34, quick=True)
    else:
        ended = harness.run(*call.split(), cwd=folder, limit=60, memory=2**34, quick=True)
    COUNTS[name] += 1
    problem = ended.problem
    if not problem and ended.code and not format.fails and not special:
        problem = "an error for a damaged cache"
    if not problem and ended.code == 0 and re.search(rb"\bnan\b", ended.out):
        problem = "NaN in the answer"
    after = identify(folder)
    lost = [name for name in before if after.get(name) != before[name] and not may_change(name, call)]
    if not problem and lost:
        problem = f"{lost[0]} is changed"
    new = [name for name in after if name not in before]
    if not problem and ended.code and (leftovers := [n for n in new if n.startswith("out") or ".aligner-tmp" in n]):
        problem = f"{leftovers[0]} is left after an error"
    return f"{problem}: {kind} {relative}\n{ended.describe()}" if problem else ""


def replace_by_special(rng: random.Random, path: Path) -> str:
    """Replace a file with something that is not a regular file, and return what it is."""
    path.unlink()
    kind = rng.choice(("pipe", "folder", "/dev/zero", "/dev/null", "/proc/self/mem", "nowhere", path.name))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)
    return kind


def identify(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the mode and, for files, the inode, size and time of everything below a folder, by relative name."""
    states = {}
    for root, folders, names in os.walk(folder):
        for path in (os.path.join(root, name) for name in folders + names):
            status = os.lstat(path)
            content = () if stat.S_ISDIR(status.st_mode) else (status.st_ino, status.st_size, status.st_mtime_ns)
            states[os.path.relpath(path, folder)] = (status.st_mode, *content)
    return states


def may_change(name: str, call: str) -> bool:
    """Return whether a call may replace a file: it is in an output folder or in the cache, and is not foreign."""
    words = call.split()
    outputs = {words[i + 1] for i, word in enumerate(words) if word in ("--out_dir", "--output_dir")}
    return Path(name).name != "thesis.tex" and name.split("/")[0] in outputs | {".aligner-cache"}


def reads(call: str, relative: Path) -> bool:
    """Return whether a call names a file or its top-level folder."""
    return not {relative.as_posix(), relative.parts[0]}.isdisjoint(call.split())


@contextlib.contextmanager
def replying(content: bytes) -> Iterator[str]:
    """Run an endpoint whose replies all have this content."""
    from judge_server import Fault, serving

    with serving(lambda body, number: Fault(content=content)) as server:
        yield server.url


def make_inputs(harness: Harness) -> Path:
    """Return a folder with a tiny model in every layout, data, runs, adapters, a bank and evaluations."""
    folder = harness.folder / "inputs"
    if folder.exists():
        return folder
    import pyarrow as pa
    import pyarrow.parquet
    import torch
    from safetensors.torch import load_file

    from lit_llama.bank import Bank
    from lit_llama.checkpoint import read_adapter
    from lit_llama.model import LLaMAConfig

    folder.mkdir()
    material = make_material(harness)
    shutil.copytree(material / "meta", folder / "meta")
    for path in material.glob("*.json*"):
        shutil.copy(path, folder)

    def run(call: str) -> None:
        ended = harness.run(*call.split(), cwd=folder)
        assert ended.code == 0, ended.describe()

    run("scripts/convert_checkpoint.py --checkpoint_dir meta --output_dir tiny --block_size 256")
    run("scripts/convert_hf_checkpoint.py --reverse --checkpoint_dir tiny --output_dir hf --max_shard_size 140KB")
    run("scripts/convert_hf_checkpoint.py --reverse --checkpoint_dir tiny --output_dir one")
    for name in ("pth", "json", "bin"):
        shutil.copytree(folder / ("one" if name == "bin" else "tiny"), folder / name)
        (folder / name / ".aligner-manifest.json").unlink()
    for path, new in (
        ("pth/lit_model.safetensors", "pth/lit-llama.pth"),
        ("bin/model.safetensors", "bin/pytorch_model.bin"),
    ):
        torch.save(load_file(folder / path), folder / new)
        (folder / path).unlink()
    shutil.copytree(folder / "tiny", folder / "chatty")
    (folder / "chatty/chat_template.jinja").write_text(TEMPLATE)
    (folder / "chatty/tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "bos_token": "<s>"}))
    (folder / "json/tokenizer.model").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(folder / "one" / name, folder / "json")

    rows = json.loads((folder / "rows.json").read_text())
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pa.parquet.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    turns = [("system", "Be."), ("user", "Who?"), ("assistant", "A cat."), ("user", "So?"), ("assistant", "Yes.")]
    chats = [{"messages": [{"role": role, "content": f"{text} {i}"} for role, text in turns]} for i in range(3)]
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    chats[0]["messages"][2]["tool_calls"] = calls
    chats.append({"conversations": [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Ah."}], "tools": "[]"})
    (folder / "chat.json").write_text(json.dumps(chats))
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (folder / "prompts.jsonl").write_text(
        '{"prompt": "Who?", "adapter": "one"}\n{"instruction": "What?", "input": "x"}\n'
    )
    (folder / "prompts.json").write_text('[{"prompt": "Who?", "adapter": "one"}, {"turns": ["Why?"], "id": 3}]')
    (folder / "prompts.txt").write_text("Who?\nWhat?\n")
    run(f"{ALPACA} rows.json --output_dir data")
    run(f"scripts/prepare_beaver_safe.py --data_format preference --data_file pairs.jsonl {PREPARE} --output_dir pairs")
    run(f"{SFT} --out_dir run --max_steps 4")
    run(f"{ALPACA} rows.json --stage rl --output_dir asks")
    run(f"{DPO} --out_dir dpo --max_steps 4")
    run(f"{RL} --out_dir rl --max_steps 4")
    for call, name in ((SFT, "run"), (DPO, "dpo"), (RL, "rl")):  # keep a finished and a killed run of each kind
        ended = harness.run(*f"{call} --out_dir half --max_steps 4".split(), cwd=folder, watch=folder / "half")
        shutil.rmtree(folder / "half")
        kill_at = len(ended.calls) * 3 // 4
        harness.run(*f"{call} --out_dir half --max_steps 4".split(), cwd=folder, watch=folder / "half", kill_at=kill_at)
        (folder / name).rename(folder / f"whole-{name}")
        (folder / "half").rename(folder / name)
    run(f"finetune/lora.py --checkpoint_dir tiny --data_dir data --out_dir lora --max_steps 1 {TRAIN}")
    shutil.copy(folder / "run/last.safetensors", folder / "a.safetensors")
    shutil.copy(folder / "lora/last.safetensors", folder / "lora.safetensors")
    torch.save(load_file(folder / "a.safetensors"), folder / "a.pth")
    bank = Bank(LLaMAConfig.from_json(folder / "tiny/lit_config.json"), folder / "tiny", start_layer=0)
    for name in ("one", "two"):
        bank.add(name, read_adapter(folder / "a.safetensors"))
    bank.save(folder / "bank.safetensors")
    (folder / "sft.yaml").write_text("learning_rate: 0.01\nmethod_config: {}\nwarmup_epochs: 0.5\nseed: 3\n")
    (folder / "answer.yaml").write_text("prompt: ['Who?', 'What?']\ntemperature: 0.5\ntop_k: 3\nseed: 4\n")

    (folder / "mmlu").mkdir()
    question = '"How many, then?",1,2,3,4,{}\n'
    for split in ("dev", "test"):
        (folder / f"mmlu/anatomy_{split}.csv").write_text(question.format("B") + question.format("D"))
    shutil.make_archive(folder / "mmlu", "zip", folder / "mmlu")
    (folder / "labelled.csv").write_text("question,answer,harmful\nHow?,No.,0\nWhy?,Take this.,1\nWho?,I cannot.,0\n")
    vicuna = [{"question_id": i, "category": "generic", "turns": ["How?"]} for i in (1, 2, 3)]
    (folder / "vicuna.jsonl").write_text("".join(json.dumps(row) + "\n" for row in vicuna))
    choice = {"index": 0, "message": {"role": "assistant", "content": "8 9\nBoth."}, "finish_reason": "stop"}
    (folder / "reply.json").write_text(json.dumps({"id": "1", "model": "m", "choices": [choice], "usage": {}}))
    run("evaluate/gsm8k.py --checkpoint_dir tiny --max_new_tokens 2 --output_dir gsm8k --data_file problems.json")
    with replying((folder / "reply.json").read_bytes()) as url:
        call = f"{VICUNA} --judge_url {url}"
        run(f"{call} --output_dir judged")
    return folder


if __name__ == "__main__":
    atexit.register(lambda: print(dict(COUNTS)))
    run_campaign(check, __doc__, kinds=tuple(FORMATS))
