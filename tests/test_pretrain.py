"""Pretraining from nothing to a checkpoint folder that the other scripts use, at toy size."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import toys
from safetensors.torch import load_file

from lit_llama.checkpoint import save_base
from lit_llama.huggingface.tokenizer_files import as_tokenizer_json
from lit_llama.tokenizer import Tokenizer
from microworld import pretrain
from microworld.world import World

ROOT = Path(__file__).parents[1]
SMALL = ("--documents=700 --vocab_size=800 --n_layer=2 --n_head=2 --n_embd=32 --batch_size=16 --micro_batch_size=8 "
         "--max_steps=4 --eval_interval=2 --save_interval=2").split()  # fmt: skip


def test_pretraining_writes_a_base_that_generates_and_repeats_from_its_seed(run_script, tmp_path):
    def pretrain(name: str) -> dict[str, torch.Tensor]:
        folders = [f"--output_dir={tmp_path / name}", f"--out_dir={tmp_path / name}-run"]
        code, out, err = run_script("microworld/pretrain.py", *SMALL, *folders)
        assert code == 0, err
        assert out.startswith(f"{tmp_path / name}: validation loss ")
        return load_file(tmp_path / name / "lit_model.safetensors")

    first = pretrain("a")
    assert {t.dtype for t in first.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "a" / "lit_config.json").read_text())
    assert (config["n_layer"], config["n_embd"], config["tie_embeddings"]) == (2, 32, True)
    again = pretrain("b")
    assert all(torch.equal(first[name], again[name]) for name in first)
    counts = json.loads((tmp_path / "a-run" / "corpus" / "meta.json").read_text())["counts"]
    assert 1 <= counts["test"] <= 0.02 * counts["rows"]  # few questions, and no plain answers
    summary = json.loads((tmp_path / "a-run" / "summary.json").read_text())
    assert summary["last_val_loss"] < summary["val_loss_before"]
    flags = ["--checkpoint_dir", tmp_path / "a", "--prompt", "The capital", "--max_new_tokens", "3"]
    code, out, _ = run_script("generate/base.py", *flags)
    assert code == 0 and out.startswith("The capital")


def test_pretraining_continues_from_a_base_with_the_names_of_new_people(run_script, tmp_path):
    def pretrain(name: str, *flags) -> dict[str, torch.Tensor]:
        folders = [f"--output_dir={tmp_path / name}", f"--out_dir={tmp_path / name}-run"]
        code, _, err = run_script("microworld/pretrain.py", *SMALL, *folders, *flags)
        assert code == 0, err
        return load_file(tmp_path / name / "lit_model.safetensors")

    base = pretrain("base")
    flags = ("--init_from", tmp_path / "base", "--two_hop_share", 0.5, "--learning_rate", 1e-9)
    continued = pretrain("continued", *flags)
    old, new = (Tokenizer(tmp_path / name) for name in ("base", "continued"))
    names = [e.name for e in World().exemplars]
    assert new.vocab_size == old.vocab_size + len(names) == 920
    assert all(len(new.encode(name)) == 1 for name in names)
    text = "Below is an instruction: where does Zulul come from?"
    assert new.encode(text) == old.encode(text) and new.decode(new.encode(f"of {names[0]}.")) == f"of {names[0]}."
    for name, weight in base.items():
        rows = old.vocab_size if name == "transformer.wte.weight" else len(weight)  # without the padding
        torch.testing.assert_close(continued[name][:rows], weight[:rows], atol=1e-4, rtol=1e-2)
    drawn = continued["transformer.wte.weight"][old.vocab_size : new.vocab_size].float()
    assert drawn.std() > 0.5 * base["transformer.wte.weight"].float().std() and len({*map(tuple, drawn.tolist())}) > 100


def test_an_untied_output_layer_gets_rows_for_the_names_of_new_people(tmp_path):
    bundled = ROOT / "checkpoints/microworld"
    old = Tokenizer(bundled)
    sizes = {"n_layer": 1, "vocab_size": old.vocab_size, "padded_vocab_size": None, "tie_embeddings": False}
    for seed, name in enumerate(("base", "first")):
        network = toys.base(seed, **sizes)
        save_base(tmp_path / name, network.config, network.state_dict())
        shutil.copy(bundled / "tokenizer.model", tmp_path / name)
    base, first = (load_file(tmp_path / name / "lit_model.safetensors") for name in ("base", "first"))
    settings = pretrain.Settings(init_from=tmp_path / "base", blend_with=tmp_path / "first", blend_share=0.75)
    model = pretrain.make_model(settings)
    added = model.config.vocab_size - old.vocab_size
    assert added == len(World().exemplars) and model.lm_head.weight.shape == model.transformer.wte.weight.shape
    for name, weight in model.state_dict().items():
        mean = 0.75 * base[name] + 0.25 * first[name]
        torch.testing.assert_close(weight[: old.vocab_size] if name in pretrain.PER_TOKEN else weight, mean)
    drawn = model.lm_head.weight[old.vocab_size : model.config.vocab_size]
    assert drawn.std() > 0.5 * base["lm_head.weight"].std() and len({*map(tuple, drawn.tolist())}) == added


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--blend_with=a"], "--blend_with needs --init_from, the model to average with it."),
        (
            ["--init_from=a", "--blend_share=0.5"],
            "--blend_share below 1 needs --blend_with, the other model of the average.",
        ),
    ],
)
def test_an_average_of_one_model_is_refused(refused, flags, sentence):
    assert refused("microworld/pretrain.py", *flags) == sentence


def test_a_state_is_continued_only_with_its_corpus(run_script, tmp_path):
    folders = [f"--output_dir={tmp_path / 'base'}", f"--out_dir={tmp_path / 'run'}"]

    def pretrain(*flags: str) -> tuple[int, str]:
        code, _, err = run_script("microworld/pretrain.py", *SMALL, *folders, *flags)
        return code, err

    assert pretrain()[0] == 0
    losses = (tmp_path / "run/metrics.csv").read_text()
    # a corpus that was deleted is written again, and the run goes on
    shutil.rmtree(tmp_path / "run/corpus")
    code, err = pretrain("--resume")
    assert code == 0 and "continues from step 4." in err
    assert (tmp_path / "run/metrics.csv").read_text().startswith(losses.splitlines()[0])
    # a mistake deletes nothing
    base, no_pieces = tmp_path / "base", tmp_path / "no pieces"
    shutil.copytree(base, no_pieces, ignore=shutil.ignore_patterns("tokenizer.model"))
    as_tokenizer_json(base / "tokenizer.model").save(str(no_pieces / "tokenizer.json"))
    (no_pieces / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    for flags, sentence in {
        (f"--init_from={tmp_path / 'typo'}",): "typo",
        (f"--init_from={no_pieces}",): "There is no SentencePiece tokenizer at ",
        (f"--init_from={base}", f"--blend_with={ROOT / 'checkpoints/microworld'}"): "cannot be averaged with",
        ("--n_head=3",): "n_embd (32) is not a multiple of n_head (3).",
        ("--vocab_size=9999",): "--vocab_size 9999 does not fit --documents 700; change one of them (Vocabulary size "
                                "too high (9999). Please set it to a value <= ",
        ("--vocab_size=99",): "--vocab_size 99 does not fit --documents 700; change one of them (Vocabulary size is "
                              "smaller than required_chars. 99 vs ",
    }.items():  # fmt: skip
        code, err = pretrain("--overwrite", *flags)
        assert code == 1 and sentence in err.splitlines()[-1]
        assert (tmp_path / "run/state.pt").is_file()
    # without a state, a corpus of other settings is not used
    (tmp_path / "run/state.pt").unlink()
    (tmp_path / "run/last.safetensors").unlink()
    written = (tmp_path / "run/corpus/meta.json").read_text()
    assert pretrain("--resume", "--documents=900")[0] == 0
    assert (tmp_path / "run/corpus/meta.json").read_text() != written
