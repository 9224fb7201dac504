"""The recipes and pages of howto/: their settings, numbers, links, commands and code are correct."""

import importlib.util
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from lit_llama import checkpoint, cli
from lit_llama.aligner import mark_only_adapter_as_trainable
from lit_llama.checkpoint import load_model, save_adapter
from lit_llama.data import SFTData
from lit_llama.generation import Sampling, generate
from lit_llama.logps import LabelLogps
from lit_llama.memory import base_bytes
from lit_llama.methods import METHODS
from lit_llama.model import LLaMA
from lit_llama.run.report import generate_command
from lit_llama.tokenizer import Tokenizer
from lit_llama.train import lr_at

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "howto").glob("*.md"))]
RECIPES = sorted((ROOT / "howto" / "recipes").glob("*.yaml"))
SFT_RECIPES = [path for path in RECIPES if "_dpo_" not in path.stem and "llama32" not in path.stem]


def load_script(path: Path, name: str = "") -> ModuleType:
    """Import a file as a separate module."""
    spec = importlib.util.spec_from_file_location(name or f"script_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def parse(script: Path, words: list[str]) -> Any:
    """Return the settings that a script parses from its command line.

    Raises:
        SystemExit: The script refuses them.
    """
    return cli.parse(load_script(script).Settings, words)


# == recipes ==


@pytest.mark.parametrize("path", SFT_RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_the_settings_in_its_name(path, tmp_path, monkeypatch):
    args = parse(ROOT / "finetune/aligner.py", ["--config", str(path)])
    data, size, n = re.fullmatch(r"(alpaca|metamath)_(7|13|70)b_n(\d+)", path.stem).groups()
    assert (args.adapter_prompt_length, args.adapter_start_layer) == (int(n), 2)
    assert args.checkpoint_dir == Path(f"checkpoints/Llama-2-{size}B")
    assert args.data_dir == Path("data") / data
    assert args.out_dir == Path("out/aligner") / path.stem.replace("_", "-")
    assert (args.epochs, args.warmup_epochs) == {"alpaca": (8, 2), "metamath": (3, 1)}[data]
    assert (args.batch_size, args.learning_rate, args.weight_decay, args.lr_schedule) == (64, 9e-3, 0.02, "constant")
    monkeypatch.chdir(tmp_path)
    assert f"--config howto/recipes/{path.name}" in path.read_text(encoding="utf-8")


def test_there_is_a_recipe_for_each_setting_of_the_paper():
    alpaca = {f"alpaca_{size}_n{n}" for size in ("7b", "13b") for n in (1, 10)} | {"alpaca_70b_n1"}
    metamath = {f"metamath_7b_n{n}" for n in (1, 10, 100, 300)}
    others = {"beaver_dpo_7b_n1", "metamath_llama32_3b_n1", "metamath_llama32_3b_n10"}
    assert {path.stem for path in RECIPES} == alpaca | metamath | others


def test_the_numbers_on_the_page_on_large_models_are_correct(monkeypatch):
    page = (ROOT / "howto/large_models.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.endswith("GB |")]
    assert [row[0] for row in rows] == ["Llama-2-13B", "30B", "Llama-2-70B"]
    for name, *row in rows:
        with torch.device("meta"):
            network = LLaMA.from_name(name).bfloat16()
        n, block = (sum(p.numel() for p in part.parameters()) for part in (network, network.transformer.h[0]))
        per_device = [base_bytes(network, shards=devices) for devices in (2, 4, 8, 16)]
        sizes = [f"{2 * n / 1e9:.1f} GB", f"{2 * block / 1e9:.2f} GB", *(f"{size / 1e9:.1f} GB" for size in per_device)]
        assert row == [f"{n:,}", *sizes]
    config = network.config
    assert f"{2 * config.n_layer * config.n_embd / 1e6:.2f} MB for Llama-2-70B, so 5.4 GB" in page
    assert round(8 * 512 * 2 * config.n_layer * config.n_embd / 1e9, 1) == 5.4
    with torch.device("meta"):
        trained = METHODS["aligner"].from_name(name).adapter_parameters().values()
    assert sum(p.numel() for p in trained) == 13_184 and "13,184 trainable parameters on Llama-2-70B" in page
    settings = parse(ROOT / "finetune/aligner.py", ["--config", str(ROOT / "howto/recipes/alpaca_70b_n1.yaml")])
    assert (settings.strategy, settings.devices, settings.gradient_checkpointing) == ("fsdp", 8, True)
    on_gpus = replace(settings, precision="auto")
    assert "--adapter out/aligner/alpaca-70b-n1 --devices 8 --prompt" in generate_command(on_gpus)
    monkeypatch.chdir(ROOT / "howto")  # the recipe's bf16-true is not what "auto" chooses without a GPU
    command = generate_command(replace(settings, strategy="auto", accelerator="cpu"))
    assert command.startswith("python ../generate/aligner.py --checkpoint_dir")
    assert " --accelerator cpu --precision bf16-true --prompt " in command
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert "--devices 4 --prompt" in generate_command(replace(on_gpus, devices="auto"))


@pytest.mark.parametrize(("n", "count"), [(1, 3_696), (10, 31_344)])
def test_the_recipes_with_the_budget_of_pefts_comparison(n, count):
    path = ROOT / f"howto/recipes/metamath_llama32_3b_n{n}.yaml"
    args = parse(ROOT / "finetune/aligner.py", ["--config", str(path)])
    assert (args.adapter_prompt_length, args.adapter_start_layer, args.checkpoint_dir.name) == (n, 2, "Llama-3.2-3B")
    assert (args.max_steps, args.batch_size, args.out_dir.name) == (5000, 4, f"metamath-llama32-3b-n{n}")
    assert 395_000 * 0.99 / args.batch_size * args.epochs > args.max_steps
    with torch.device("meta"):
        network = METHODS["aligner"].from_name(args.checkpoint_dir.name, adapter_prompt_length=n)
    assert sum(p.numel() for name, p in network.named_parameters() if network.is_adapter_parameter(name)) == count
    text, page = (file.read_text(encoding="utf-8") for file in (path, ROOT / "howto/baselines.md"))
    assert f"{count:,} parameters" in text and f"| {count:,} |" in page


def test_the_dpo_recipe_and_the_learning_rate_of_the_authors_run(tmp_path, monkeypatch):
    path = ROOT / "howto/recipes/beaver_dpo_7b_n1.yaml"
    args = parse(ROOT / "finetune/alignerDPO.py", ["--config", str(path)])
    assert (args.adapter_prompt_length, args.beta, args.batch_size, args.epochs) == (1, 0.1, 64, 3)
    assert (args.learning_rate, args.weight_decay, args.sft_weight) == (1e-4, 0.02, 0)
    prepare = parse(ROOT / "scripts/prepare_beaver_safe.py", [])
    assert (args.data_dir.name, prepare.max_seq_length) == (f"beaver-safe-{prepare.stage}", 1024)
    assert prepare.checkpoint_dir == args.checkpoint_dir
    monkeypatch.chdir(tmp_path)
    text = path.read_text(encoding="utf-8")
    rows, micro_batch_size = 160_000, 8  # sequences: half of them are chosen responses
    steps = args.epochs * rows / 64
    peak = args.learning_rate * steps / (args.warmup_epochs * rows / micro_batch_size)
    epochs = steps * 32 / rows  # of pairs
    assert args.epochs * rows / micro_batch_size == 60_000  # the published file is named after the last one, 059999
    assert f"--learning_rate {peak * 1e5:g}e-5 --warmup_epochs {epochs:g} --epochs {epochs:g} --batch_size 32" in text
    assert all(f"python {script}" in text for script in ("finetune/aligner.py", "finetune/alignerDPO.py"))


@pytest.mark.parametrize(("epochs", "warmup", "peak"), [(8, 2, 4.5e-3), (3, 1, 3.375e-3)], ids=["alpaca", "metamath"])
def test_the_settings_that_reproduce_the_authors_learning_rate(epochs, warmup, peak):
    """Their learning rate in step s is 9e-3 · s / w, where w counts micro-batches of 8, but s counts batches of 64."""
    rows = 50_000
    warmup_iters, steps = warmup * rows // 8, epochs * rows // 64
    theirs = [9e-3 * s / warmup_iters for s in range(steps)]
    ours = [lr_at(s, peak=peak, warmup_steps=steps, max_steps=steps) for s in range(steps)]
    assert warmup_iters > steps
    assert max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) < 2 * peak / steps
    page = (ROOT / "howto/finetune_aligner.md").read_text(encoding="utf-8")
    assert f"--learning_rate {peak * 1e3:g}e-3 --warmup_epochs {epochs}" in page


# == pages ==


def code_blocks(page: Path) -> list[tuple[str, str]]:
    """Return (language, text) of every fenced or indented code block."""
    text = page.read_text(encoding="utf-8")
    fenced = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    blocks = [(match[1], match[2]) for match in fenced.finditer(text)]
    return blocks + [("", block) for block in re.findall(r"(?:^ {4}.*\n)+", fenced.sub("", text), re.MULTILINE)]


def python_blocks(page: str) -> list[str]:
    return [text for language, text in code_blocks(ROOT / "howto" / page) if language == "python"]


def commands(page: Path) -> list[list[str]]:
    """Return every `python SCRIPT …` or `fabric run … SCRIPT …` on a page, as its words from the script on."""
    results = []
    for language, text in code_blocks(page):
        for line in text.replace("\\\n", " ").splitlines() if language in ("", "bash") else []:
            if not re.match(r"\s*(python3?|fabric run) ", line):
                continue
            words = shlex.split(line, comments=True)
            scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
            results += [words[scripts[0] :]] if scripts else []
    return results


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_link_targets_exist(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    assert links
    for link in links:
        if re.match(r"https?:", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_accepted(page, tmp_path):
    """The script exists and accepts the flags and their values."""
    page_commands = commands(page)
    assert page_commands
    for script, *words in page_commands:
        if script == "scripts/run.py":  # it has no settings and runs another script
            script, *words = ["scripts/demo.py", *words[1:]] if words[0] == "demo" else words
        if script == "test":
            continue
        if script.startswith("tests/campaign/"):  # run_campaign's flags
            assert {word for word in words if word.startswith("--")} <= {"--cases", "--seed", "--every"}
            assert (ROOT / script).is_file(), script
            continue
        if "--config" in words and words[words.index("--config") + 1].startswith("out/"):  # written by a training run
            i = words.index("--config")
            words[i + 1] = str(tmp_path / "config.yaml")
            Path(words[i + 1]).write_text("seed: 1\n", encoding="utf-8")
        words = [str(ROOT / word) if word.startswith("howto/recipes/") else word for word in words]
        if "--print_config" in words:
            words.remove("--print_config")
        assert (ROOT / script).is_file(), script
        assert all((ROOT / word).exists() for word in words if word.startswith("howto/examples/")), words
        try:
            parse(ROOT / script, words)
        except SystemExit:
            pytest.fail(f"{script} refuses {' '.join(words)}")


def test_the_diagram_has_an_opaque_background():
    svg = (ROOT / "howto/method.svg").read_text(encoding="utf-8")
    assert re.search(r'<rect width="1200" height="640"[^>]* fill="#ffffff"/>', svg)
    assert "5,056" in svg


# == Python code on the pages ==


@pytest.fixture
def workplace(tmp_path, monkeypatch, base_dir, data_dir) -> Path:
    """Return a working directory with tiny random models in place of the bundled files that the pages use."""
    for name, target in (("checkpoints/microworld", base_dir), ("data/microworld-pirate", data_dir)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
    generator = torch.Generator().manual_seed(0)
    state = {"global_value_embedding.weight": torch.randn(1, 32, generator=generator)}
    state |= {f"transformer.h.{i}.attn.gating_factor": torch.randn(1, 4, 1, 1, generator=generator) for i in (1, 2)}
    meta = {"method": "aligner", "config": {"adapter_prompt_length": 1, "adapter_start_layer": 1},
            "prompt_style": "plain", "training": {"val_loss": 1.5}}  # fmt: skip
    for folder, name in (
        ("aligner_weights/microworld-pirate-n1", "adapter"),
        ("out/aligner/microworld-pirate", "best"),
    ):
        save_adapter(tmp_path / folder / f"{name}.safetensors", state, meta)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_on_the_inference_page(workplace, capsys):
    (block,) = python_blocks("inference.md")
    names: dict = {}
    exec(compile(block, "inference.md", "exec"), names)
    aligned, base, streamed = capsys.readouterr().out.split("\n", 2)
    assert len(eval(aligned)) == len(eval(base)) == 2
    assert streamed


def test_python_on_the_page_on_many_aligners(workplace, capsys):
    (block,) = python_blocks("many_aligners.md")
    exec(compile(block, "many_aligners.md", "exec"), {})
    answers, ids = capsys.readouterr().out.splitlines()
    assert len(eval(answers)) == 4 and [len(new) for new in eval(ids)] == [5, 5]


def test_python_on_the_weights_page(workplace, capsys):
    configuration, header = python_blocks("weights.md")
    folder = workplace / "checkpoints/Llama-2-7B"
    folder.mkdir(parents=True, exist_ok=True)
    exec(compile(configuration, "weights.md", "exec"), {})
    assert '"n_embd": 4096' in (folder / "lit_config.json").read_text()
    exec(compile(header, "weights.md", "exec"), {})
    assert capsys.readouterr().out.split()[0] == "aligner"


def test_commands_and_python_on_the_merging_page(workplace, capsys, run_script):
    pytest.importorskip("transformers")
    for command in commands(ROOT / "howto/merging.md"):
        assert run_script(*command)[0] == 0
    (block,) = python_blocks("merging.md")
    exec(compile(block, "merging.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_python_on_the_data_page(workplace, capsys):
    preview, script = python_blocks("prepare_data.md")
    exec(compile(preview, "prepare_data.md", "exec"), {})
    assert capsys.readouterr().out.count(" eat? => ") == 3

    rows = workplace / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "{n} + 1?", "answer": "2"}}\n' for n in range(3)), encoding="utf-8")
    (workplace / "prepare_faq.py").write_text(script, encoding="utf-8")
    module = load_script(workplace / "prepare_faq.py", "prepare_faq")
    module.main(cli.parse(module.Settings, ["--data_file", str(rows), "--checkpoint_dir", "checkpoints/microworld"]))
    ((prompt, response),) = SFTData("data/faq", "test").prompts(1)
    decode = Tokenizer("checkpoints/microworld").decode
    assert re.search(r"### Instruction:\s[012] \+ 1\?\s+### Response:$", decode(prompt))
    assert decode(response) == "2"


def test_python_on_the_evaluation_page(workplace, capsys):
    (block,) = python_blocks("evaluate.md")
    row = '{"question": "123456 + 765432?", "answer": "#### 888888"}\n'  # no random model guesses that
    Path("gsm8k_test.jsonl").write_text(3 * row, encoding="utf-8")
    exec(compile(block, "evaluate.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1].startswith("0.0 ")
    assert len(Path("out/gsm8k-pirate/answers.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_python_on_the_customizing_page(workplace, monkeypatch):
    method, variant, loss = python_blocks("customize.md")
    (workplace / "head_bias.py").write_text(method, encoding="utf-8")
    module = load_script(workplace / "head_bias.py", "head_bias")
    base = Path("checkpoints/microworld")
    model = load_model(base, method=module.LLaMA, method_config={"adapter_start_layer": 1})
    idx = torch.arange(3, 23).reshape(2, 10)
    assert torch.equal(model(idx), load_model(base)(idx))

    names: dict = {}
    exec(compile(loss, "customize.md", "exec"), names)
    data = names["RowMeanData"](Path("data/microworld-pirate"), "test")
    mark_only_adapter_as_trainable(model)
    assert data.weights.tolist() == [1.0] * len(data)
    total = names["RowMeanLoss"]()(LabelLogps(model), data.batch(np.arange(len(data))))["loss"]
    losses = [-LabelLogps(model)(**data.batch(np.array([row]))).mean() for row in range(len(data))]
    torch.testing.assert_close(total, torch.stack(losses).sum())
    total.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {f"transformer.h.{layer}.attn.head_bias" for layer in (1, 2)}
    assert all(grad.abs().sum() > 0 for grad in trained.values())

    (workplace / "temperature.py").write_text(variant, encoding="utf-8")
    variant_class = load_script(workplace / "temperature.py", "temperature").LLaMA
    varied = load_model(base, method=variant_class, method_config={"adapter_prompt_length": 3})
    assert torch.equal(varied(idx), load_model(base)(idx))  # zero gates
    mark_only_adapter_as_trainable(varied)
    for name, p in varied.adapter_parameters().items():
        p.data += 1 - p.data if name.endswith(".gating_factor") else 0
    varied(idx).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in varied.adapter_parameters().values())
    (cached,) = generate(varied, [idx[0].tolist()], Sampling(3))
    assert cached[0] == varied(idx)[0, -1, : varied.config.vocab_size].argmax()  # without vocabulary padding

    # once METHODS contains the method, a saved adapter loads by the name of its method
    monkeypatch.setitem(METHODS, "head_bias", module.LLaMA)
    state = {name: torch.randn_like(grad) for name, grad in trained.items()}
    save_adapter(Path("a.safetensors"), state, {"method": "head_bias", "config": {"adapter_start_layer": 1}})
    loaded = load_model(base, checkpoint.read_adapter(Path("a.safetensors")))
    assert not torch.equal(loaded(idx), model(idx))
