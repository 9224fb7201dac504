"""The generate scripts as a user calls them, on the bundled model and its adapters."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from lit_llama.checkpoint import read_adapter, save_adapter
from microworld.world import UNSEEN, World, parse

ROOT = Path(__file__).parent.parent
PIRATE = ROOT / "aligner_weights" / "microworld-pirate-n1"
QUESTIONS = [q for q in World(0).questions(UNSEEN) if q.text.startswith("What")][:3]


@pytest.fixture(autouse=True)
def in_repository_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_defaults_answer_in_the_adapters_form(run_script):
    code, out, err = run_script("generate/aligner.py")
    assert code == 0
    answers = [line for line in out.splitlines() if line and not line.startswith(">")]
    assert [parse(a).form for a in answers] == ["pirate", "pirate"]
    assert "tokens/s" in err and "GB at peak" in err and "loaded in" in err


def test_one_prompt_prints_only_the_answer(run_script):
    question = QUESTIONS[0]
    _, out, _ = run_script("generate/aligner.py", "--prompt", question.text)
    response = parse(out)
    assert (response.form, response.topic, response.value) == ("pirate", question.topic, question.answer)
    assert out.count("\n") == 1
    _, _, err = run_script("generate/aligner.py", "--prompt", question.text, "--max_new_tokens", "3")
    assert "answers that reached --max_new_tokens 3: 1 of 1\n" in err


def test_strength_0_is_the_base_and_compare_base_shows_both(run_script):
    prompts = [q.text for q in QUESTIONS]
    _, unaligned, _ = run_script("generate/aligner.py", "--strength", "0", "--prompt", *prompts)
    _, base, _ = run_script("generate/base.py", "--prompt_style", "alpaca", "--temperature", "0", "--prompt", *prompts)
    assert unaligned == base
    _, both, _ = run_script("generate/aligner.py", "--compare_base", "--prompt", *prompts)
    base_answers = [line.removeprefix("base:").strip() for line in both.splitlines() if line.startswith("base:")]
    assert base_answers == [line for line in base.splitlines() if line and not line.startswith(">")]
    assert both.count("aligned:") == 3


def test_sampled_answers_depend_on_every_sampling_setting_but_not_on_the_batch_size(run_script):
    def answers(*flags: str) -> str:
        code, out, err = run_script("generate/aligner.py", *flags, "--prompt", *(q.text for q in QUESTIONS))
        assert code == 0, err
        return out

    greedy, flags = answers(), ("--temperature", "2", "--seed", "7")
    sampled = answers(*flags, "--batch_size", "1")
    assert answers(*flags, "--batch_size", "8") == sampled != greedy
    assert answers("--temperature", "2", "--seed", "8") not in (sampled, greedy)
    assert answers(*flags, "--top_k", "1") == answers(*flags, "--top_p", "1e-6") == greedy  # the most likely token


def test_several_batches_have_a_progress_bar(run_script):
    prompts = [q.text for q in QUESTIONS]
    _, _, one_batch = run_script("generate/aligner.py", "--prompt", *prompts)
    code, out, err = run_script("generate/aligner.py", "--batch_size", "2", "--prompt", *prompts)
    assert code == 0 and "Answering: 100%" in err and "| 3/3 [" in err
    assert "Answering" not in one_batch and "Answering" not in out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--interactive", "--output_file", "a.json"), "--interactive and --output_file cannot be combined."),
        (("--interactive", "--prompt_file", "a.txt"), "--interactive and --prompt_file cannot be combined."),
        (("--interactive", "--input", "x"), "--interactive and --input cannot be combined."),
        (("--prompt_file", "a.txt", "--input", "x"), "--input is the context of --prompt; in --prompt_file, "),
        (("--compile", "--quantize", "nf4"), "--compile and --quantize cannot be combined"),
        (("--compile", "--devices", "2"), "--compile needs a complete base on one device, and --devices 2 shards it."),
    ],
)
def test_settings_that_cannot_be_combined_are_refused_at_once(refused, flags, sentence):
    assert refused("generate/aligner.py", *flags, "--checkpoint_dir", "/nowhere").startswith(sentence)


@pytest.mark.parametrize("name", ["prompt", "adapter", "strength"])
def test_an_empty_list_is_refused(refused, tmp_path, name):
    (tmp_path / "settings.yaml").write_text(f"{name}: []\nbank: []\nuse: []\n")
    assert refused("generate/aligner.py", "--config", tmp_path / "settings.yaml") == (
        f"{name} is empty; give at least one."
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("authors.json", json.dumps([{"prompt": q.text, "input": ""} for q in QUESTIONS])),
        ("bench.jsonl", "\n".join(json.dumps({"question_id": i, "category": "x", "turns": [q.text, "And?"]})
                                  for i, q in enumerate(QUESTIONS))),
        ("lines.txt", "\n\n".join(q.text for q in QUESTIONS)),
    ],
)  # fmt: skip
def test_prompt_files_and_output_file(run_script, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    output = tmp_path / "answers.json"
    flags = ("--prompt_file", tmp_path / name, "--output_file", output, "--accelerator", "cpu")
    code, _, err = run_script("generate/aligner.py", *flags)
    assert code == 0 and str(output) in err
    records = json.loads(output.read_text())
    assert [r["prompt"] for r in records] == [q.text for q in QUESTIONS]
    assert [parse(r["response"]).value for r in records] == [q.answer for q in QUESTIONS]
    assert Path(records[0]["adapter"]).parent == PIRATE.relative_to(ROOT)
    settings = records[0]["settings"]
    assert settings["temperature"] == 0.0 and settings["versions"]["torch"]
    assert (settings["system"], settings["precision"], settings["quantize"]) == ("", "float32", None)
    if name == "bench.jsonl":
        assert [r["id"] for r in records] == [0, 1, 2]


@pytest.mark.parametrize("name", ["aligner", "base"])
def test_answers_are_saved_before_a_closed_pipe_ends_the_program(tmp_path, python, name):
    (tmp_path / "many.txt").write_text(f"{QUESTIONS[0].text}\n" * 200)
    output = tmp_path / "answers.json"
    command = [python, f"generate/{name}.py", "--prompt_file", tmp_path / "many.txt", "--output_file", output]
    if name == "base":
        command += ["--checkpoint_dir", ROOT / "checkpoints/microworld", "--max_new_tokens", "2"]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as pipe:
        result = subprocess.run(command, cwd=ROOT, stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 141, result.stderr
    assert len(json.loads(output.read_text())) == 200


def test_interactive_answers_line_by_line(run_script):
    code, out, _ = run_script(
        "generate/aligner.py", "--interactive", stdin=f"{QUESTIONS[0].text}\n\n{QUESTIONS[1].text}\n"
    )
    assert code == 0
    assert [parse(line).value for line in out.splitlines()] == [q.answer for q in QUESTIONS[:2]]


def test_base_continues_a_text(run_script):
    _, out, _ = run_script("generate/base.py", "--temperature", "0", "--prompt", f"Arr, {QUESTIONS[0].topic}")
    assert out.startswith(f"Arr, {QUESTIONS[0].topic} be ")
    assert parse(out).value == QUESTIONS[0].answer


def test_user_errors_are_one_line(refused, tmp_path):
    json_pth = tmp_path / "aligner.pth"
    json_pth.write_text('{"question": "Which?"}\n')
    assert "it is JSON text" in refused("generate/aligner.py", "--adapter", json_pth)
    assert "no adapter at" in refused("generate/aligner.py", "--adapter", tmp_path / "none.pth")
    assert "empty" in refused("generate/aligner.py", "--prompt", " ")
    assert "context 256" in refused("generate/aligner.py", "--prompt", "well " * 300)
    assert "max_new_tokens is 0" in refused("generate/aligner.py", "--max_new_tokens", "0")
    assert "no prompt style 'yoda'" in refused("generate/base.py", "--prompt_style", "yoda")
    assert "no checkpoint folder" in refused("generate/base.py", "--checkpoint_dir", tmp_path / "none")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    line = refused("generate/aligner.py", "--prompt_file", tmp_path / "bad.jsonl")
    assert "Row 2 has no field 'prompt'" in line


def test_an_adapter_for_another_base_is_refused(refused, tmp_path):
    adapter = read_adapter(PIRATE)
    wide = {name: torch.zeros(1, 64) if t.dim() == 2 else t for name, t in adapter.state.items()}
    save_adapter(tmp_path / "wide.safetensors", wide, {})
    assert "is 64 wide and the base model" in refused("generate/aligner.py", "--adapter", tmp_path / "wide.safetensors")
    meta = {**adapter.meta, "base": {**adapter.meta["base"], "weights": "0" * 16}}
    save_adapter(tmp_path / "other.safetensors", adapter.state, meta)
    assert "with other weights" in refused("generate/aligner.py", "--adapter", tmp_path / "other.safetensors")
