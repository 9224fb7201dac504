"""Adapters on the Hugging Face Hub: uploaded by scripts/share.py, read as hf:owner/name, with the real client."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from generate.interactive import BankAdapters
from lit_llama.bank import open_bank
from lit_llama.checkpoint import read_adapter, save_adapter
from lit_llama.compose import load_with_bank
from lit_llama.huggingface.hub import repository
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError

SCRIPT, GENERATE = "scripts/share.py", "generate/aligner.py"
PIRATE = Path("aligner_weights/microworld-pirate-n1")
ALPACA = {"repo_id": "tatsu-lab/alpaca", "revision": "v1"}
QUESTION = "What is the capital of Pilmaria?"


def share(tmp_path: Path, *flags: object) -> list[object]:
    return [SCRIPT, "--adapter", PIRATE, "--repo_id", "me/pirate", "--output_dir", tmp_path / "share", *flags]


def test_an_adapter_can_be_uploaded_and_read_back(hub, run_script, tmp_path):
    code, out, err = run_script(*share(tmp_path, "--base_model", "me/microworld", "--license", "apache-2.0"))
    assert code == 0, err
    assert re.fullmatch(r"http://127.0.0.1:\d+/me/pirate/commit/0+1\n", out)
    assert "--adapter hf:me/pirate" in err and "hf_writer" not in out + err
    files = hub.repositories["me/pirate"][-1]
    assert files.keys() == {"adapter.safetensors", "README.md"} and "me/pirate" not in hub.private
    assert "PUT /objects/" in " ".join(hub.asked)  # by Git LFS, as the real Hub requires for safetensors

    ours, theirs = read_adapter(PIRATE), read_adapter(Path("hf:me/pirate"))
    assert theirs.state.keys() == ours.state.keys() and theirs.method == "aligner"
    assert all((theirs.state[name] == t).all() for name, t in ours.state.items())
    answers = [run_script(GENERATE, "--adapter", path, "--prompt", QUESTION)[:2] for path in (PIRATE, "hf:me/pirate")]
    assert answers[0] == answers[1] and answers[0][0] == 0
    assert list(open_bank([Path("hf:me/pirate@v1")], Path("checkpoints/microworld"))) == ["pirate"]


def test_the_model_card_describes_the_adapter(hub, run_script, tmp_path):
    run_script(*share(tmp_path, "--base_model", "me/microworld", "--license", "apache-2.0", "--dry_run",
                      "--description", "Answers like a pirate."))  # fmt: skip
    text = (tmp_path / "share/README.md").read_text()
    front, body = text.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0", "base_model": "me/microworld", "base_model_relation": "adapter",
        "tags": ["aligner", "arxiv:2312.05503"],
    }  # fmt: skip
    assert "# pirate\n\nAnswers like a pirate.\n\nAn [Aligner]" in body
    for line in ("| trained parameters | 240 |", "1,458 rows for training", "| prompt style | alpaca |",
                 "| loss | 0.0057 |", "| learning_rate | 0.03 |", "torch 2.13.0", "--adapter hf:me/pirate ",
                 "scripts/merge_aligner.py", "8 layers, width 192, fingerprint `"):  # fmt: skip
        assert line in body, line
    assert not re.search(r"\n\n\n|None|\{\{", text)
    assert hub.asked == []  # nothing was uploaded


def test_an_edited_card_is_kept_and_uploaded(hub, run_script, tmp_path):
    card = tmp_path / "share/README.md"
    for description in ("Answers like a pirate.", "Says arr."):  # a card that was not edited is replaced
        assert "edited" not in run_script(*share(tmp_path, "--dry_run", "--description", description))[2]
        assert description in card.read_text()
    for edited in (card.read_text().replace("Says arr.", "Says arr, and my words."), "A card without the mark."):
        card.write_text(edited)
        code, _, err = run_script(*share(tmp_path, "--overwrite", "--description", "Says arr."))
        assert code == 0 and f"note: {card} is kept: it was edited, or an earlier version wrote it. " in err
        assert hub.repositories["me/pirate"][-1]["README.md"].decode() == card.read_text() == edited


def test_the_model_card_contains_the_metrics_of_a_run_but_not_its_paths(hub, run_script, tmp_path):
    run, adapter = tmp_path / "secret/run", read_adapter(PIRATE)
    training = {"step": 8, "val_loss": 0.5, "settings": {"out_dir": str(run), "data_dir": "data/x", "epochs": 4.0}}
    run.mkdir(parents=True)
    meta = {**adapter.meta, "training": training, "data": {"source": "tatsu-lab/alpaca, revision v1", **ALPACA}}
    save_adapter(run / "best.safetensors", adapter.state, meta)
    (run / "metrics.csv").write_text("step,lr,val/loss,val/reward_accuracy\n8,,0.5,0.75\n16,,0.6,0.9\n")
    code, out, err = run_script(*share(tmp_path), "--adapter", run, "--dry_run")
    assert (code, out) == (0, f"{tmp_path / 'share'}\n"), err
    text = (tmp_path / "share/README.md").read_text()
    assert "| reward accuracy | 0.7500 |" in text and "| loss | 0.5000 |" in text and "- tatsu-lab/alpaca" in text
    assert "secret" not in text and "secret" not in str(read_adapter(tmp_path / "share/adapter.safetensors").meta)


def test_a_file_of_the_authors_can_be_shared(hub, run_script, tmp_path):
    """It has no header, and repeats the prefix in each layer."""
    state = read_adapter(PIRATE).state
    prefix = state["global_value_embedding.weight"]
    aliases = {name.replace("gating_factor", "adapter_wte.weight"): prefix for name in state if "gating" in name}
    torch.save({**state, **aliases}, tmp_path / "published.pth")
    code, _, err = run_script(*share(tmp_path, "--dry_run"), "--adapter", tmp_path / "published.pth")
    assert code == 0, err
    text, shared = (tmp_path / "share/README.md").read_text(), read_adapter(tmp_path / "share/adapter.safetensors")
    assert "| trained parameters | 240 |" in text and "fingerprint" not in text
    assert shared.state.keys() == state.keys() and shared.config == {
        "adapter_prompt_length": 1,
        "adapter_start_layer": 2,
    }


@pytest.mark.parametrize("data", [{}, {"repo_id": "me/data\nlicense: mit"}])
def test_the_model_card_names_only_datasets_on_the_hub(data, hub, run_script, tmp_path):
    adapter = read_adapter(PIRATE)
    save_adapter(tmp_path / "a.safetensors", adapter.state, {**adapter.meta, "data": {"source": "data/x", **data}})
    assert run_script(*share(tmp_path, "--dry_run"), "--adapter", tmp_path / "a.safetensors")[0] == 0
    front = yaml.safe_load((tmp_path / "share/README.md").read_text().split("---\n")[1])
    assert front.keys() == {"tags"}


@pytest.mark.parametrize(
    "changes",
    [{"data": {"source": 3}}, {"data": {"repo_id": 3}}, {"data": {"counts": [1]}}, {"training": {"step": [1]}},
     {"training": {"val_loss": "x"}}, {"versions": ["x"]}, {"base": {"config": {"a": 1}, "weights": "x"}}],
)  # fmt: skip
def test_a_header_with_wrong_types_is_refused(changes, hub, refused, tmp_path):
    adapter = read_adapter(PIRATE)
    save_adapter(tmp_path / "a.safetensors", adapter.state, {**adapter.meta, **changes})
    assert "header of " in refused(*share(tmp_path, "--dry_run"), "--adapter", tmp_path / "a.safetensors")
    assert not (tmp_path / "share").exists()


def test_overwrite_replaces_an_adapter_but_never_a_model(hub, run_script, refused, tmp_path):
    hub.repositories["me/pirate"] = [{"README.md": b"a model", "model.safetensors": b""}]
    assert "me/pirate contains something other than an adapter" in refused(*share(tmp_path))
    hub.repositories["me/pirate"] = [{"README.md": b"card", "adapter.safetensors": b"old"}]
    assert "already has an adapter; replace it with --overwrite" in refused(*share(tmp_path))
    public = "me/pirate is public; make it private on the Hub, or leave out --private."
    assert refused(*share(tmp_path, "--overwrite", "--private")) == public
    assert len(hub.repositories["me/pirate"]) == 1
    assert run_script(*share(tmp_path, "--overwrite"))[0] == 0
    assert hub.repositories["me/pirate"][-1]["adapter.safetensors"] != b"old"
    assert run_script(*share(tmp_path, "--private"), "--repo_id", "me/other")[0] == 0 and hub.private == {"me/other"}
    assert run_script(*share(tmp_path, "--overwrite", "--private"), "--repo_id", "me/other")[0] == 0


def test_an_interrupted_upload_is_explained(hub, refused, tmp_path, monkeypatch):
    def upload_folder(self, **options) -> None:
        raise RuntimeError("Error while uploading 'adapter.safetensors' to the Hub.")

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    assert refused(*share(tmp_path)) == (
        "me/pirate could not be uploaded (Error while uploading 'adapter.safetensors' to the Hub); run again to "
        "continue."
    )


def test_upload_and_download_errors_are_explained(hub, refused, run_script, tmp_path, monkeypatch):
    assert "Name the repository with --repo_id" in refused(SCRIPT, "--adapter", PIRATE)
    assert "write it like hf:owner/name@revision" in refused(*share(tmp_path), "--repo_id", "a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert "Your token has no permission to write to me/pirate; create one that has at http://" in refused(
        *share(tmp_path)
    )
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not accept your token; log in with `hf auth login`, or set HF_TOKEN" in refused(*share(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert 'must be one of ["mit"]); change --license' in refused(*share(tmp_path), "--license", "Llama 2")
    monkeypatch.delenv("HF_TOKEN")
    assert "There is no token for the Hub" in refused(*share(tmp_path))

    def read(name: str) -> str:
        with pytest.raises(UserError) as error:
            read_adapter(Path(name))
        return str(error.value)

    hub.repositories = {"me/secret": [{}], "me/model": [{"pytorch_model.bin": b""}]}
    hub.private.add("me/secret")
    assert "There is no model me/nothing that you may see" in read("hf:me/nothing")
    assert "There is no model me/secret that you may see" in read("hf:me/secret")
    assert "me/model has no adapter.safetensors" in read("hf:me/model")
    assert "me/model has no branch, tag or commit 'v9'" in read("hf:me/model@v9")
    assert "does not name an adapter on the Hub; write it like hf:owner/name@revision" in read("hf:model")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub tries again for 23 s
    assert "me/model is not in the cache, and http://127.0.0.1:9 cannot be reached" in read("hf:me/model")


def test_a_chat_answers_with_adapters_on_the_hub(hub):
    folders = {"me": PIRATE, "you": Path("aligner_weights/microworld-json-n1")}
    hub.repositories = {
        f"{owner}/mine": [{"adapter.safetensors": (folder / "adapter.safetensors").read_bytes()}]
        for owner, folder in folders.items()
    }
    base = Path("checkpoints/microworld")
    adapters = BankAdapters(load_with_bank(base, open_bank([], base)), Tokenizer(base), (), None)
    for text, names in (
        ("hf:me/mine", ["mine"]),
        ("hf:you/mine", ["hf:you/mine"]),
        ("hf:me/mine", ["mine"]),
        ("hf:you/mine+mine", ["hf:you/mine", "mine"]),
    ):
        adapters.use(text)
        assert [name for name, _ in adapters.terms] == names
    assert adapters.names == ["mine", "hf:you/mine"]
    with pytest.raises(UserError, match="hf:mine' does not name an adapter on the Hub"):
        adapters.use("hf:mine")


def test_a_downloaded_adapter_needs_no_network(hub, run_script, tmp_path, monkeypatch):
    assert run_script(*share(tmp_path))[0] == 0
    first = read_adapter(Path("hf:me/pirate"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert read_adapter(Path("hf:me/pirate")).path == first.path


def test_a_damaged_adapter_is_refused(hub):
    hub.repositories = {"me/pirate": [{"adapter.safetensors": b"not safetensors"}]}
    with pytest.raises(UserError, match="is not a checkpoint"):
        read_adapter(Path("hf:me/pirate"))


@pytest.mark.parametrize("name, parts", [
    ("hf:me/a-b.c_d", ("me/a-b.c_d", "main")),
    ("hf:me/a@v1.0", ("me/a", "v1.0")),
    ("hf:me/a@refs/pr/1", ("me/a", "refs/pr/1")),
])  # fmt: skip
def test_names_have_an_owner_and_an_optional_revision(name, parts):
    assert repository(name) == parts
