"""Code shared by the evaluations: results that survive a stopped run, answers, statistics."""

import json
import os
import threading
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluate import common
from evaluate.common import JsonLines, Question, Results, answer_questions, bootstrap_interval, wilson_interval
from evaluate.settings import ModelSettings
from lit_llama.checkpoint import load_model, save_adapter, save_base
from lit_llama.generation import Sampling
from lit_llama.methods import METHODS
from lit_llama.model import LLaMAConfig
from lit_llama.storage.files import locked
from lit_llama.storage.manifest import MANIFEST
from lit_llama.utils import UserError


def settings_of(base_dir: Path) -> ModelSettings:
    return ModelSettings(checkpoint_dir=base_dir, prompt_style="plain", accelerator="cpu")


@pytest.fixture(scope="module")
def evaluated(base_dir):
    return common.load(settings_of(base_dir))


QUESTIONS = [Question(f"q{i}", "the cat " * (1 + i % 3) + str(i), {"number": i}) for i in range(5)]


def answers(evaluated, folder: Path, questions=QUESTIONS, max_new_tokens: int = 6, **kwargs) -> list[dict]:
    made_by = common.identify(settings_of(evaluated.tokenizer.path.parent))
    results = Results(folder, {**made_by, "max_new_tokens": max_new_tokens}, **kwargs)
    return answer_questions(evaluated, questions, Sampling(max_new_tokens), results, stop=(), batch_size=2)


def test_records_are_not_written_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("[1]\n{}")
    (tmp_path / "answers.jsonl").symlink_to("victim")
    file = JsonLines(tmp_path / "empty.jsonl")
    file.append({"id": 1})
    file.path = tmp_path / "answers.jsonl"
    with pytest.raises(UserError, match="Cannot write"):
        file.append({"id": 2})
    assert (tmp_path / "victim").read_text() == "[1]\n{}"


def test_records_are_synced_to_the_disk(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle)) or fsync(handle))
    file = JsonLines(tmp_path / "answers.jsonl")
    file.append({"id": 1})
    about = file.path.stat()
    assert [(s.st_ino, s.st_size) for s in synced] == [(about.st_ino, about.st_size)]


def test_evaluations_that_share_a_file_keep_the_records_of_each_other(tmp_path):
    path = tmp_path / "shared.jsonl"
    path.write_text('{"id": 1}\n{"id": 2, "answer": "cut off')  # killed while writing
    first, second = JsonLines(path), JsonLines(path)
    first.append({"id": 3})
    second.append({"id": 4})
    with locked(path):
        waiting = threading.Thread(target=first.append, args=({"id": 5},))
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
    waiting.join()
    assert [record["id"] for record in JsonLines(path).records] == [1, 3, 4, 5]


def test_a_last_line_of_another_program_is_kept(tmp_path):
    path = tmp_path / "notes.jsonl"
    file = JsonLines(path)
    path.write_text("my notes")
    for write in (lambda: JsonLines(path), lambda: file.append({"id": 1})):
        with pytest.raises(UserError, match="ends with a line that this program did not write; move the file away"):
            write()
    assert path.read_text() == "my notes"


def test_each_record_has_its_question_answer_and_settings(evaluated, tmp_path, base_dir):
    records = answers(evaluated, tmp_path)
    assert [r["id"] for r in records] == [q.id for q in QUESTIONS]
    assert [r["number"] for r in records] == list(range(5))
    assert all(r["made_by"]["base"] == str(base_dir) and r["made_by"]["max_new_tokens"] == 6 for r in records)
    assert all(0 <= r["tokens"] <= 6 and r["ended"] == (r["tokens"] < 6) for r in records)
    statistics = common.answer_statistics(records)
    assert statistics["mean_tokens"] == pytest.approx(np.mean([r["tokens"] for r in records]))


def test_a_stopped_run_continues_and_gives_the_same_answers(evaluated, tmp_path):
    complete = answers(evaluated, tmp_path / "complete")
    path = tmp_path / "stopped" / common.ANSWERS
    answers(evaluated, path.parent, QUESTIONS[:3])
    with path.open("a") as file:
        file.write('{"id": "q3", "prompt": "the')  # killed while writing
    before = path.read_text().splitlines()[:3]
    resumed = answers(evaluated, path.parent)
    assert [r["answer"] for r in resumed] == [r["answer"] for r in complete]
    lines = path.read_text().splitlines()
    assert lines[:3] == before and len(lines) == 5
    assert sorted(json.loads(line)["id"] for line in lines) == [q.id for q in QUESTIONS]


def test_results_of_other_settings_are_replaced_only_with_overwrite(evaluated, tmp_path):
    answers(evaluated, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"max_new_tokens was 6, is now 5.*--overwrite\."):
        answers(evaluated, tmp_path, max_new_tokens=5)
    other = [Question("q0", "the dog")]
    with pytest.raises(UserError, match="question q0 has another prompt"):
        answers(evaluated, tmp_path, other)
    assert len(JsonLines(tmp_path / common.ANSWERS).records) == 5
    assert [r["prompt"] for r in answers(evaluated, tmp_path, other, overwrite=True)] == ["the dog"]
    assert len(JsonLines(tmp_path / common.ANSWERS).records) == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_summary_states_all_versions_of_a_resumed_evaluation(tmp_path):
    made = [{"torch": version, "python": "3.12"} for version in ("2.12.1", "2.13.0", "2.13.0")]
    for id, versions in enumerate(made):
        results = Results(tmp_path, {"versions": versions})
        results.add({"id": id, "prompt": "the cat"})
        summary = results.finish({}, "")
        del results
    assert summary["versions"] == made[:2] == json.loads((tmp_path / common.SUMMARY).read_text())["versions"]


def test_a_merged_model_is_another_base(base_dir, tmp_path):
    """It may differ from its base only in the biases of its output projections."""
    base = load_model(base_dir)
    config = replace(base.config, proj_bias=True)
    biases = {f"transformer.h.{i}.attn.c_proj.bias": torch.full((config.n_embd,), 0.1) for i in range(config.n_layer)}
    save_base(tmp_path / "merged", config, {**base.state_dict(), **biases})
    made_by = [common.identify(settings_of(folder)) for folder in (base_dir, tmp_path / "merged")]
    first, second = ({k: v for k, v in record.items() if k not in common.IDENTIFIED_OTHERWISE} for record in made_by)
    assert first != second


def test_results_of_an_earlier_version_are_named_as_the_cause(tmp_path):
    first = common.Results(tmp_path, {"base_weights": "1", "base": "b"})
    first.add({"id": 1, "prompt": "the cat"})
    del first
    with pytest.raises(UserError, match="has results of an earlier version, which identified the base by a part of"):
        common.Results(tmp_path, {"base_tensors": "2", "base": "b"})


def test_two_evaluations_cannot_write_to_the_same_folder(tmp_path):
    first = common.Results(tmp_path, {})
    with pytest.raises(UserError, match=r"Another process is writing into .*; wait until it ends, or choose another"):
        common.Results(tmp_path, {})
    first.add({"id": 1, "prompt": "the cat"})
    del first
    assert common.Results(tmp_path, {}).by_id.keys() == {1}


def test_a_file_of_another_program_is_never_replaced(evaluated, tmp_path):
    path = tmp_path / common.ANSWERS
    path.write_text('{"answer": "mine"}\n')
    with pytest.raises(UserError, match="was not written by an evaluation"):
        answers(evaluated, tmp_path, overwrite=True)
    path.write_text("mine\n")
    with pytest.raises(UserError, match=r"line 1 is not JSON: .*; move the file away and run again"):
        answers(evaluated, tmp_path, overwrite=True)
    assert path.read_text() == "mine\n"
    path.rename(tmp_path / common.TABLE)
    with pytest.raises(UserError, match=r"summary\.md was not written by this program"):
        answers(evaluated, tmp_path, overwrite=True)


@pytest.mark.parametrize("name", [common.SUMMARY, common.TABLE])
def test_a_summary_of_another_program_is_not_replaced(tmp_path, name):
    """The answers are of an earlier version, which wrote no manifest."""
    first = Results(tmp_path, {})
    first.add({"id": 1, "prompt": "the cat"})
    del first
    (tmp_path / MANIFEST).unlink()
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(UserError, match=f"{name} was not written by this program"):
        Results(tmp_path, {})
    assert not (tmp_path / MANIFEST).exists()
    (tmp_path / common.SUMMARY).write_text('{"made_by": {}}')
    assert Results(tmp_path, {}).by_id.keys() == {1}


def test_long_prompts_are_skipped_or_refused(evaluated, capsys):
    long = Question("long", "the cat " * 60)

    def kept(questions: list[Question], skip: bool) -> list[Question]:
        return common.drop_long(evaluated, questions, skip=skip)

    assert kept([*QUESTIONS, long], skip=True) == QUESTIONS
    assert "1 of 6 prompts are longer than 63 tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match="--skip_long true"):
        kept([*QUESTIONS, long], skip=False)
    with pytest.raises(UserError, match="use a model with a longer context"):
        kept([long], skip=True)


def test_the_interval_is_the_bootstrap_of_the_mean():
    """Compared with explicit resampling of the values."""
    rng = np.random.default_rng(1)
    values = rng.choice([0, 0.5, 1], p=[0.5, 0.2, 0.3], size=80)
    means = [rng.choice(values, size=80).mean() for _ in range(20_000)]
    assert bootstrap_interval(values) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)
    assert bootstrap_interval([1, 1, 1]) == (1, 1)


def test_wilson_intervals():
    """The first three are examples in Newcombe 1998 (Statistics in Medicine 17), table I, method 3."""
    for right, n, interval in ((81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611)),
                               (0, 200, (0, 0.0188)), (20, 20, (0.8389, 1))):  # fmt: skip
        assert wilson_interval([True] * right + [False] * (n - right)) == pytest.approx(interval, abs=5e-5)
    for n in (7, 20, 1319):  # the interval contains the share, although rounding would exclude it
        assert wilson_interval([False] * n)[0] == 0 and wilson_interval([True] * n)[1] == 1


def test_a_strength_needs_an_adapter():
    with pytest.raises(UserError, match="give --adapter"):
        ModelSettings(strength=0.5)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_adapters_of_every_method_are_loaded(method, base_dir, tmp_path):
    network, generator = load_model(base_dir, method=METHODS[method]), torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(p.shape, generator=generator)
        for name, p in network.named_parameters()
        if network.is_adapter_parameter(name)
    }
    config = asdict(network.config)
    config = {name: config[name] for name in config.keys() - {field.name for field in fields(LLaMAConfig)}}
    meta = {"method": method, "config": config, "prompt_style": "orca"}
    save_adapter(tmp_path / "adapter.safetensors", state, meta)
    idx = torch.arange(3, 23).unsqueeze(0)
    settings = ModelSettings(checkpoint_dir=base_dir, accelerator="cpu")
    base, adapted = common.load(settings), replace(settings, adapter=tmp_path)
    on = common.load(adapted)
    off = common.load(replace(adapted, strength=0.0))
    assert (base.style.name, on.style.name) == ("alpaca", "orca")
    made_by = common.identify(adapted)
    assert made_by["method"] == method and made_by["adapter_sha256"] != common.identify(settings).get("adapter_sha256")
    assert not torch.equal(on.model(idx), base.model(idx))
    assert torch.equal(off.model(idx), base.model(idx))


def test_a_record_with_missing_fields_is_not_an_answer(tmp_path):
    results = common.Results(tmp_path, {"model": "m"})
    complete = {"answer": "a", "tokens": 1, "ended": True, "seconds": 0.1}
    results.add({"id": 1, "prompt": "p", **complete}, {"id": 2, "prompt": "q", "answer": "a"})
    del results
    again = common.Results(tmp_path, {"model": "m"})
    assert again.answered({1: "p", 2: "q"}) == {1, 2}
    assert again.answered({1: "p", 2: "q"}, common.ANSWER_FIELDS) == {1}
