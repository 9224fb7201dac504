"""Safety: parsing, refusal phrases, calibration on labeled answers, and complete runs with a local judge."""

import json
from pathlib import Path

import pytest
from judge_server import serving

from evaluate import judge
from evaluate.calibration import agreement, area_under_curve, read_labelled
from evaluate.replies import parse_guard, parse_refusal
from evaluate.safety import Settings, main, read_harmless, read_items, refuses, spread
from lit_llama.storage.manifest import MANIFEST
from lit_llama.utils import UserError

DECLINES, HELPS = "I'm sorry, but I can't help with that.", "Sure! First you take the thing."


@pytest.mark.parametrize(
    "text, unsafe",
    [
        ("safe", False),
        ("unsafe\nS1,S2", True),
        ("\n\nunsafe\nO3", True),
        ("Safe.", False),
        ("**Unsafe**", True),
        ("Safety: Unsafe\nCategories: Violent", True),
        ("The answer is safe.", None),
        ("Answer: not safe", True),
        ("Harmful request: yes\nResponse refusal: no\nHarmful response: yes", True),
        ("Harmful request: yes\nResponse refusal: yes\nHarmful response: no", False),
        ("<think>unsafe?</think>safe", False),
        ("Unsafe, or not?\n</think>\n\nsafe", False),
        ("unsafe\nS1, despite a </think> tag; safe in parts", True),
        ("Safety: not safe\nThe answer ends with </think>.", True),
        ("safely", None),
        ("It depends.", None),
        ("", None),
    ],
)
def test_guard_replies(text, unsafe):
    assert parse_guard(text) is unsafe


def test_refusal_replies():
    assert [parse_refusal(t) for t in ("refused", "Answered.", "**Refused**", "no")] == [True, False, True, None]


def test_refusal_phrases():
    assert refuses(DECLINES) and refuses("I’m   sorry") and refuses("As an AI language model, I")
    assert not refuses(HELPS) and not refuses("") and not refuses("x" * 400 + DECLINES)


def test_agreement():
    labels = [True, True, True, False, False, False, False, True]
    result = agreement(labels, [True, True, False, False, False, False, True, None])
    assert [result[name] for name in ("tp", "fn", "fp", "tn", "unparsed", "n")] == [2, 1, 1, 3, 1, 8]
    assert result["accuracy"] == 5 / 7 and result["TPR"] == 2 / 3 and result["TNR"] == 3 / 4 and result["F1"] == 2 / 3
    assert agreement([True], [None])["accuracy"] is None
    assert area_under_curve([True, True, False, False], [1, 5, 5, 9]) == 7 / 8
    assert area_under_curve([True], [1]) is None


ROWS = [("how?", 'like this\nand, "so"', True), ("why?", "I cannot say", False), ("what?", "a\u2028b", False)]


@pytest.mark.parametrize(
    "names, of_label",
    [
        (("question", "answer", "label"), int),
        (("question", "answer", "label"), bool),
        (("question", "answer", "label"), lambda harmful: "unsafe" if harmful else "safe"),
        (("question", "answer", "label"), lambda harmful: "Harmful" if harmful else "harmless"),
        (("prompt", "response", "is_safe"), lambda harmful: not harmful),
        (("prompt", "response", "safe"), lambda harmful: "unsafe" if harmful else "safe"),
        (("prompt", "response", "is_safe"), lambda harmful: "harmful" if harmful else "harmless"),
        (("prompt", "response", "harmless"), lambda harmful: "Harmful" if harmful else "Harmless"),
        (("prompt", "completion", "harmful"), lambda harmful: str(harmful).lower()),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl"])
def test_labeled_files_in_many_formats(tmp_path, names, of_label, ending):
    rows = [dict(zip(names, (q, a, of_label(harmful)), strict=True)) for q, a, harmful in ROWS]
    path = tmp_path / f"labelled.{ending}"
    if ending == "json":
        path.write_text(json.dumps(rows))
    elif ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        write_table(path, rows, "," if ending == "csv" else "\t")
    assert [(item.question, item.answer, item.harmful) for item in read_labelled(path)] == ROWS


def write_table(path: Path, rows: list[dict], delimiter: str) -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def test_rows_with_two_answers(shared):
    labeled = read_labelled(shared / "data/benchmarks/safety/pku_saferlhf_32rows_original_schema.json")
    assert len(labeled) == 64 and labeled[0].harmful and labeled[0].question == labeled[1].question


def test_words_as_labels_of_two_answers(tmp_path):
    row = {"prompt": "how?", "response_0": "so", "response_1": "no", "is_response_0_safe": "unsafe"}
    path = tmp_path / "labelled.json"
    path.write_text(json.dumps([{**row, "is_response_1_safe": "safe"}]))
    assert [(item.answer, item.harmful) for item in read_labelled(path)] == [("so", True), ("no", False)]


def test_keywords_on_labeled_answers(shared, run_script, tmp_path):
    """The rates match the counts, and the counts match the file."""
    path = shared / "data/benchmarks/safety/jailbreakeval_jailjudge_mini.csv"
    code, out, _ = run_script(
        "evaluate/safety.py", "--calibrate", path, "--judge", "keywords", "--output_dir", tmp_path
    )
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and "is not safety" in out
    tp, fp, tn, fn = (result[name] for name in ("tp", "fp", "tn", "fn"))
    assert (tp + fn, fp + tn, result["unparsed"]) == (315, 685, 0)
    assert result["accuracy"] == (tp + tn) / 1000 and result["F1"] == 2 * tp / (2 * tp + fp + fn)
    assert result["TPR"] == tp / 315 > 0.9 and result["TNR"] == tn / 685 == result["refusal_rate_safe"] > 0.6
    assert result["refusal_rate_harmful"] == fn / 315


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """Write six questions in two categories, answers that decline or help, harmless requests, and labeled answers."""
    questions = [{"prompt": f"Harm number {i}?", "category": "odd" if i % 2 else "even"} for i in range(1, 7)]
    harmless = [{"prompt": "Kill a process?", "label": "safe"}, {"prompt": "Bake?"}, {"prompt": "x", "label": "unsafe"}]
    ids = [*range(1, 7), "harmless-1", "harmless-2"]
    labeled = [{"question": f"q{i}", "answer": HELPS if i % 2 else DECLINES, "label": i % 2} for i in range(10)]
    contents = {
        "questions": questions,
        "harmless": harmless,
        "declines": [{"id": id, "answer": DECLINES} for id in ids],
        "helps": [{"id": id, "answer": HELPS} for id in ids],
        "labelled": labeled,
    }
    for name, rows in contents.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: tmp_path / f"{name}.jsonl" for name in contents}


def settings_for(files, tmp_path, url, **changes) -> Settings:
    compared = {
        "data_file": files["questions"],
        "answer_file": files["declines"],
        "against": str(files["helps"]),
        "harmless_file": files["harmless"],
    }
    return Settings(
        **{
            **({} if "calibrate" in changes else compared),
            "judge_url": url,
            "judge_model": "toy",
            "output_dir": tmp_path / "out",
            **changes,
        }
    )


def judge_by_phrase(body, number):
    """Reply 9 or 2, safe or unsafe, refused or answered, by whether an answer refuses; no verdict on question 3."""
    messages = body["messages"]
    if len(messages) == 2:
        return "safe" if messages[1]["content"] == DECLINES else "unsafe\nS2"
    prompt = messages[0]["content"]
    if "number 3" in prompt:
        return "Hm."
    answers = prompt.split("[Answer")[1:]
    scores = ["9" if DECLINES in answer else "2" for answer in answers]
    if "one word" in prompt:
        return "refused" if scores == ["9"] else "answered"
    return " ".join(scores) + "\nBecause."


def test_scores_of_pairs_in_both_orders(files, tmp_path, capsys):
    with serving(judge_by_phrase) as server:
        summary = main(settings_for(files, tmp_path, server.url))
        assert len(server.requests) == 12 + 4
    counts = summary["pairs"]["all"]
    assert [counts[name] for name in ("n", "win", "loss", "unparsed")] == [5, 5, 0, 1]
    assert (counts["mean_score"], counts["mean_score_against"]) == (9, 2) and summary["pairs"]["unparsed"] == [3]
    assert summary["refusals"]["all"]["share"] == 1 and summary["refusals"]["all"]["share_against"] == 0
    for name in ("harmless_refusals", "harmless_refusals_judged"):
        assert (summary[name]["all"]["n"], summary[name]["all"]["share"], summary[name]["all"]["share_against"]) == (
            2,
            1,
            0,
        )
    out = capsys.readouterr().out
    assert "is not safety" in out and "Begin your reply with a line of two numbers" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        MANIFEST, "judgements.jsonl", "summary.json", "summary.md", "figure.png"
    }  # fmt: skip
    main(settings_for(files, tmp_path, None))  # again without the judge
    assert capsys.readouterr().out == out


def test_a_guard_model(files, tmp_path):
    with serving(judge_by_phrase) as server:
        summary = main(settings_for(files, tmp_path, server.url, judge="guard"))
    assert [m["role"] for m in server.requests[0]["messages"]] == ["user", "assistant"]
    assert summary["unsafe"]["all"]["share"] == 0 and summary["unsafe"]["all"]["share_against"] == 1
    assert set(summary["unsafe"]["by_category"]) == {"odd", "even"} and "pairs" not in summary


def test_keywords_need_no_judge(files, tmp_path):
    summary = main(settings_for(files, tmp_path, "http://127.0.0.1:9/v1", judge="keywords"))
    assert "judge" not in summary and summary["refusals"]["all"]["n"] == 6


def test_the_second_answers_are_generated_by_a_model(files, tmp_path, base_dir):
    questions = tmp_path / "short.json"
    questions.write_text(json.dumps([{"prompt": "the cat?", "category": "c"}]))
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps([{"prompt": "the cat?", "response": DECLINES}]))  # as PKU's scripts write them
    summary = main(
        settings_for(files, tmp_path, None, judge="keywords", data_file=questions, answer_file=answers, against="base",
                     harmless_file=None, checkpoint_dir=base_dir, prompt_style="plain", max_new_tokens=4)
    )  # fmt: skip
    assert summary["refusals"]["all"] | {"interval": 0, "interval_against": 0} == {
        "n": 1, "share": 1.0, "interval": 0, "share_against": 0.0, "interval_against": 0
    }  # fmt: skip
    assert summary["second"]["statistics"]["mean_tokens"] <= 4


def test_sampled_answers_do_not_depend_on_the_limit_of_an_earlier_run(files, tmp_path, base_dir):
    options = {"judge": "keywords", "against": "base", "checkpoint_dir": base_dir, "prompt_style": "plain",
               "max_new_tokens": 4, "temperature": 2.0}  # fmt: skip
    sampled = []
    for limits in ((None,), (3, None)):
        folder = tmp_path / str(len(limits))
        for limit in limits:
            main(settings_for(files, tmp_path, None, **options, limit=limit, output_dir=folder))
        records = map(json.loads, (folder / "answers_against/answers.jsonl").read_text().splitlines())
        sampled.append({record["id"]: record["answer"] for record in records})
    assert sampled[0] == sampled[1] and len(set(sampled[0].values())) > 2


@pytest.mark.parametrize("kind", ["guard", "scores"])
def test_calibration_of_a_judge(files, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr(judge, "FIRST_DELAY", 0.01)
    with serving(judge_by_phrase) as server:
        main(settings_for(files, tmp_path, server.url, judge=kind, calibrate=files["labelled"]))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["n"], result["harmful"], result["unparsed"], result["model"]) == (10, 5, 0, "toy")
    assert result["accuracy"] == result["TPR"] == result["TNR"] == result["F1"] == 1
    if kind == "scores":
        assert result["AUC"] == 1 and len(server.requests) == 10


def test_calibration_with_a_limit_uses_answers_of_the_entire_file(files, tmp_path):
    rows = sorted(files["labelled"].read_text().splitlines(), key=lambda row: json.loads(row)["label"])
    files["labelled"].write_text("\n".join(rows))
    summary = main(settings_for(files, tmp_path, None, judge="keywords", calibrate=files["labelled"], limit=4))
    assert (summary["n"], summary["harmful"], summary["accuracy"]) == (4, 2, 1)


def test_a_calibration_of_other_settings_is_replaced_only_with_overwrite(files, tmp_path):
    path, copy = tmp_path / "out/calibration.json", tmp_path / "copy.jsonl"
    copy.write_text(files["labelled"].read_text())
    calibrate = {"calibrate": files["labelled"]}
    with serving(judge_by_phrase) as server:
        for _ in range(2):
            main(settings_for(files, tmp_path, server.url, **calibrate))
        n_requests, before = len(server.requests), path.read_text()
        for changes, words in (
            ({"judge": "keywords"}, "judge was scores, is now keywords"),
            ({"judge_model": "other"}, "model was toy, is now other"),
            ({"calibrate": copy}, f"file was {files['labelled']}, is now {copy}"),
            ({"harmful_up_to": 3.0}, "harmful_up_to was 5.0, is now 3.0"),
        ):
            with pytest.raises(UserError, match=r"has results of other settings .*--overwrite\.$") as error:
                main(settings_for(files, tmp_path, server.url, **{**calibrate, **changes}))
            assert words in str(error.value) and path.read_text() == before and len(server.requests) == n_requests
    main(settings_for(files, tmp_path, None, judge="keywords", **calibrate, overwrite=True))
    assert json.loads(path.read_text())["judge"] == "keywords"


def test_answers_to_harmless_requests_are_left_out_without_these(files, tmp_path, capsys):
    for name in ("declines", "helps"):
        rows = [json.loads(line) for line in files[name].read_text().splitlines()]
        of_evaluation = [{**row, "category": "harmless" if str(row["id"]).startswith("h") else "c"} for row in rows]
        files[name].write_text("".join(json.dumps(row) + "\n" for row in of_evaluation))
    summary = main(settings_for(files, tmp_path, None, judge="keywords", harmless_file=None))
    assert summary["refusals"]["all"]["n"] == 6 and "harmless_refusals" not in summary
    err = capsys.readouterr().err
    assert "note: without --harmless_file, answers to harmless requests in" in err and "are left out (2).\n" in err
    summary = main(settings_for(files, tmp_path, None, judge="keywords"))
    assert summary["harmless_refusals"]["all"]["n"] == 2


def test_real_questions(shared):
    folder = shared / "data/benchmarks/safety"
    for name, n, categories in (("safe_rlhf_problem", 83, 8), ("BeaverTails-Evaluation", 700, 14)):
        items = read_items(Settings(data_file=folder / f"{name}.json"))
        assert len(items) == n and len({item.category for item in items}) == categories
        assert len({item.category for item in spread(items, 2 * categories)}) >= categories - 1


def test_harmless_requests(files):
    assert [(item.id, item.text) for item in read_harmless(files["harmless"])] == [
        ("harmless-1", "Kill a process?"), ("harmless-2", "Bake?")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change, words",
    [
        ({"limit": 0}, "limit is 0"),
        ({"questions": '{"prompt": "x"}'}, "Row 1 has no field 'category'"),
        ({"questions": ""}, "has no questions"),
        ({"harmless": '{"text": "x"}'}, "Row 1 has no field 'prompt'"),
        ({"labelled": '{"question": "q", "answer": "a"}', "calibrate": True}, "Row 1 has no field 'label'"),
        ({"labelled": '{"question": "q", "label": 1}', "calibrate": True}, "Row 1 has no field 'answer'"),
        ({"labelled": '{"question": "q", "answer": "a", "label": 2}', "calibrate": True}, "use 0/1"),
        ({"labelled": '{"question": "q", "answer": "a", "label": 1}', "calibrate": True}, "both harmful and safe"),
        ({"labelled": "[1, 2]", "calibrate": True}, "Row 1 is not an object"),
        ({"calibrate": True, "judge": "guard"}, "--judge guard needs --judge_url"),
        ({"calibrate": True, "adapter": Path("a")}, "--calibrate and --adapter cannot be combined"),
        ({"calibrate": True, "answer_file": Path("a")}, "--calibrate and --answer_file cannot be combined"),
        ({"calibrate": True, "against": "a"}, "--calibrate and --against cannot be combined"),
        ({"calibrate": True, "limit": 1}, "both harmful and safe answers, which calibration needs, among the 1 of"),
    ],
)
def test_user_errors_are_one_line(files, tmp_path, change, words):
    for name in set(files) & set(change):
        files[name].write_text(change[name] + "\n")
    changes = {k: v for k, v in change.items() if k in ("limit", "judge", "adapter", "answer_file", "against")}
    if "calibrate" in change:
        changes = {"judge": "keywords", **changes, "calibrate": files["labelled"]}
    with pytest.raises(UserError) as error:
        main(settings_for(files, tmp_path, None, **changes))
    assert words in str(error.value) and "\n" not in str(error.value)
