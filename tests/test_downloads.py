"""Downloads from a local server that imitates the Hugging Face Hub, and of published weights from local files."""

import errno
import json
import os
import time

import pytest

from lit_llama.huggingface.hub import explain
from scripts.download import wanted

FETCH, DOWNLOAD = "scripts/fetch_published_weights.py", "scripts/download.py"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 60, "hidden_size": 24, "intermediate_size": 36,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
MODEL = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.model": b"tokens",
    "model.safetensors": b"theirs",
}


def test_only_files_that_the_conversion_needs_are_downloaded(hub, run_script, tmp_path):
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors")
    files = {name: f"content of {name}".encode() for name in names} | {"config.json": MODEL["config.json"]}
    others = ("README.md", "pytorch_model.bin", "original/params.json", "onnx/model.onnx")
    hub.repositories["me/model"] = [files | dict.fromkeys(others, b"")]
    out = tmp_path / "out"
    code, stdout, err = run_script(DOWNLOAD, "--repo_id", "me/model", "--output_dir", out)
    assert (code, stdout) == (0, f"{out}\n"), err
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == files
    hub.asked.clear()
    assert run_script(DOWNLOAD, "--repo_id", "me/model", "--output_dir", out)[0] == 0
    assert not [line for line in hub.asked if line.startswith("GET /me/model")]  # everything exists already


def test_a_downloaded_file_that_the_user_changed_is_not_replaced(hub, run_script, refused, tmp_path):
    hub.repositories["me/model"] = [MODEL]
    flags = ("--repo_id", "me/model", "--output_dir", tmp_path / "out")
    assert run_script(DOWNLOAD, *flags)[0] == 0
    path, record = tmp_path / "out/config.json", tmp_path / "out/.cache/huggingface/download/config.json.metadata"
    path.write_text("mine")
    os.utime(path, (time.time() + 9,) * 2)
    assert refused(DOWNLOAD, *flags).startswith(f"{path} is newer than its download, so you may have edited it")
    record.write_text("cut short")
    assert refused(DOWNLOAD, *flags).startswith(f"{record} is damaged; delete it and {path}")
    assert path.read_text() == "mine"


def test_files_that_were_not_downloaded_are_not_overwritten(hub, refused, tmp_path):
    hub.repositories["me/model"] = [MODEL]
    (tmp_path / "out").mkdir()
    path = tmp_path / "out/model.safetensors"
    for content, sentence in (
        ("my own", "; choose another --output_dir."),
        ("the", ", or only in part (3 of 6 bytes); if a download was interrupted, delete this file and run again, "),
    ):
        path.write_text(content)
        error = refused(DOWNLOAD, "--repo_id", "me/model", "--output_dir", tmp_path / "out")
        assert error.startswith(f"{path} exists and was not downloaded here{sentence}") and path.read_text() == content
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    "sentence, changes",
    [
        ('The architecture is "GemmaForCausalLM"; only', {"architectures": ["GemmaForCausalLM"]}),
        ("The weights are quantized; convert the unquantized checkpoint", {"quantization_config": {"bits": 4}}),
        ("me/model has no tokenizer that can be converted: it needs tokenizer.model or tokenizer.json", None),
    ],
)
def test_models_that_cannot_be_converted_are_not_downloaded(sentence, changes, hub, refused, tmp_path):
    files = {**MODEL, "config.json": json.dumps({**CONFIG, **(changes or {})}).encode()}
    if changes is None:
        del files["tokenizer.model"]
    hub.repositories["me/model"] = [files]
    assert sentence in refused(DOWNLOAD, "--repo_id", "me/model", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists() and "model.safetensors" not in " ".join(hub.asked)


def test_names_with_slashes_are_skipped():
    names = ["config.json", "tokenizer.json", "model-1-of-1.safetensors", "model-/../../x-of-y.safetensors"]
    assert wanted(names, "x") == names[:3]


def test_weights_are_downloaded_in_one_format_only():
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    other = ["pytorch_model.bin", "consolidated.safetensors", "model.gguf"]
    index = "model.safetensors.index.json"
    assert wanted(["config.json", "tokenizer.model", *shards, index, *other], "x") == [
        "config.json", "tokenizer.model", index, *shards,
    ]  # fmt: skip
    bins = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
    names = ["config.json", "tokenizer.json", *bins]
    assert wanted(names, "x") == [*names[:2], *reversed(bins)]


def test_download_errors_name_the_cause(hub, refused, tmp_path, monkeypatch):
    out = ("--output_dir", tmp_path / "out")
    hub.repositories["me/model"] = [{"README.md": b"words"}]
    hub.failures |= {
        "me/locked": (403, {"X_Error_Code": "GatedRepo", "X_Error_Message": "Enable gated repositories."}),
        "me/forbidden": (403, {"X_Error_Message": "Your token is for another organization."}),
        "me/down": (418, {}),
    }

    def sentence(repo: str, *more: object) -> str:
        return refused(DOWNLOAD, "--repo_id", repo, *out, *more)

    assert "/me/locked, then log in with `hf auth login`, or set HF_TOKEN" in sentence("me/locked")
    assert sentence("me/locked").endswith("(the Hub says: Enable gated repositories).")
    assert "no permission to read me/forbidden; create one that has at" in sentence("me/forbidden")
    assert sentence("me/forbidden").endswith("(the Hub says: Your token is for another organization).")
    assert "There is no model me/nothing that you may see" in sentence("me/nothing")
    assert "me/down cannot be reached at http://127.0.0.1" in sentence("me/down")
    assert "not the name of a model" in sentence("a/b/c")
    assert "has no branch, tag or commit 'v9'" in sentence("me/model", "--revision", "v9")
    assert "me/model has no model to convert: it needs config.json and one of model.safetensors" in sentence("me/model")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "me/model cannot be reached at http://127.0.0.1:9 (" in sentence("me/model")
    assert not (tmp_path / "out").exists()


def test_an_error_of_the_disk_is_not_taken_for_one_of_the_network():
    def sentence(*error: object) -> str:
        return str(explain(OSError(*error), "me/model", "main"))

    assert sentence(errno.EACCES, "Permission denied", "folder/x") == (
        "Cannot write folder/x (Permission denied); choose another output folder."
    )
    assert sentence(errno.ENOSPC, "No space left on device").startswith("There is no room left to write the download:")
    assert sentence("Data error: No space left on device (os error 28)").startswith("There is no room left to write")
    assert "me/model cannot be reached at " in sentence("timed out")


def test_an_error_of_the_transfer_is_not_taken_for_one_of_the_network(refused, tmp_path, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("Data error: hash mismatch")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", broken)
    message = refused(DOWNLOAD, "--repo_id", "me/model", "--output_dir", tmp_path / "out")
    assert message == "me/model could not be downloaded (Data error: hash mismatch); run again to continue."


def test_published_weights_are_fetched_and_verified(shared, run_script, refused, tmp_path):
    source = shared / "aligner_weights_published"
    flags = ("--source", source.as_uri(), "--output_dir", tmp_path / "out")
    code, stdout, err = run_script(FETCH, *flags)
    assert (code, stdout) == (0, f"{tmp_path / 'out'}\n")
    assert "skipped" in err and "aligner10Tokens-llama2-7B" in err and "9 fetched, 0 existed" in err
    fetched = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()}
    published = {path.relative_to(source) for path in source.rglob("*.pth")}
    assert [path.name[:25] for path in published - fetched] == ["aligner10Tokens-llama2-7B"]
    assert all((tmp_path / "out" / path).read_bytes() == (source / path).read_bytes() for path in fetched)

    (tmp_path / "out" / min(fetched)).write_bytes(b"spoilt")
    assert "exists; replace it with --overwrite, or" in refused(FETCH, *flags)
    assert "1 fetched, 8 existed" in run_script(FETCH, *flags, "--overwrite", "true")[2]
    assert (tmp_path / "out" / min(fetched)).read_bytes() == (source / min(fetched)).read_bytes()


def test_published_weights_with_other_content_are_refused(run_script, tmp_path):
    folder = tmp_path / "source/Alpaca_Instruction_Following_Supervised_Finetuning"
    folder.mkdir(parents=True)
    name = "aligner1Token-llama2-7B-lr0.009bs64weightDecay0.02wu2-epoch-8.0-valloss0.9565.pth"
    flags = ("--output_dir", tmp_path / "out", "--source")
    code, _, err = run_script(FETCH, *flags, (tmp_path / "source").as_uri())
    assert code == 1 and "error: Cannot read file:" in err
    (folder / name).write_bytes(b"something else")
    code, _, err = run_script(FETCH, *flags, (tmp_path / "source").as_uri())
    assert code == 1 and f"{name} from file:" in err and "is not the published file: its sha256 begins with" in err
    assert not (tmp_path / "out").exists()


def test_an_impossible_source_of_published_weights_is_refused(run_script, tmp_path):
    code, _, err = run_script(FETCH, "--source", "http://127.0.0.1/a b", "--output_dir", tmp_path)
    assert code == 1 and "error: Cannot read http://127.0.0.1/a b" in err
