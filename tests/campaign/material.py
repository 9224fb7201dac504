"""Small inputs of every kind, which campaigns copy for each case."""

import json
import shutil
from pathlib import Path

from harness import ROOT, Harness

ADAPTER = ROOT / "aligner_weights/microworld-pirate-n1/adapter.safetensors"


def make_material(harness: Harness) -> Path:
    """Return a folder with a base, its Hugging Face conversion, a model in Meta's format, data and an adapter.

    It is created once per harness.
    """
    folder = harness.folder / "material"
    if folder.exists():
        return folder
    folder.mkdir()
    shutil.copytree(ROOT / "checkpoints/microworld", folder / "base")
    flags = ("--reverse", "--checkpoint_dir", folder / "base", "--output_dir", folder / "hf", "--dtype", "float16")
    ended = harness.run("scripts/convert_hf_checkpoint.py", *flags, cwd=folder)
    assert ended.code == 0, ended.describe()
    write_meta_model(folder / "meta")
    rows = [{"instruction": f"Name animal {i}.", "input": "", "output": f"A cat, {i} times."} for i in range(6)]
    (folder / "rows.json").write_text(json.dumps(rows))
    pairs = [{"prompt": f"Name animal {i}.", "chosen": "A cat.", "rejected": "No."} for i in range(6)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "prompts.json").write_text(json.dumps([{"prompt": "Who?"}]))
    problems = [{"question": f"What is 1 + {i}?", "answer": f"#### {1 + i}"} for i in range(3)]
    (folder / "problems.json").write_text(json.dumps(problems))
    chats = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "A cat."}]}
             for i in range(4)]  # fmt: skip
    (folder / "chat.json").write_text(json.dumps(chats))
    solved = [{"query": f"What is 1 + {i}?", "response": f"The answer is: {1 + i}"} for i in range(6)]
    (folder / "solved.json").write_text(json.dumps(solved))
    shutil.copy(ADAPTER, folder / "adapter.safetensors")
    return folder


def write_meta_model(folder: Path) -> None:
    """Write a random one-layer model in Meta's format."""
    import torch

    shapes = {"tok_embeddings": (2048, 16), "output": (2048, 16), "norm": (16,)}
    layer = {"attention.wq": (16, 16), "attention.wk": (16, 16), "attention.wv": (16, 16), "attention.wo": (16, 16),
             "feed_forward.w1": (24, 16), "feed_forward.w2": (16, 24), "feed_forward.w3": (24, 16),
             "attention_norm": (16,), "ffn_norm": (16,)}  # fmt: skip
    shapes |= {f"layers.0.{name}": shape for name, shape in layer.items()}
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(dict(dim=16, n_layers=1, n_heads=2, vocab_size=2048)))
    torch.save({f"{n}.weight": torch.randn(shape) for n, shape in shapes.items()}, folder / "consolidated.00.pth")
    shutil.copy(ROOT / "checkpoints/microworld/tokenizer.model", folder)
