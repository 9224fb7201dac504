"""The Vicuna benchmark: score parsing, replayed reviews, and complete runs with a local judge server."""

import json
import signal
import subprocess
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
import toys
from chat_models import set_today, write_dated
from judge_server import Fault, serving
from preloaded import KILL

from evaluate import answers, judge, vicuna
from evaluate.answers import fetch, read_answers
from evaluate.common import Results, pick_style
from evaluate.pairs import combine, length_controlled, tally
from evaluate.replies import parse_score, parse_scores
from evaluate.vicuna import Settings, main
from lit_llama.checkpoint import save_adapter
from lit_llama.utils import UserError

REVIEWS = ("alpaca-13b", "gpt35", "llama-13b")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", REVIEWS)
def test_parsed_scores_match_published_reviews(shared, name):
    """GPT-4's reviews, published by FastChat. One of the reviews in prose has a score corrected by hand."""
    reviews = read_lines(shared / f"data/benchmarks/vicuna/review/review_{name}_vicuna-13b.jsonl")
    assert len(reviews) == 80
    n_prose = 0
    for review in reviews:
        parsed = vicuna.parse_scores(review["text"])
        if review["text"][0].isdigit():
            assert parsed == tuple(review["score"])
        else:
            n_prose += 1
            assert parsed == tuple(review["score"]) or (name, review["question_id"], parsed) == (
                "llama-13b",
                70,
                (10, 4),
            )
    assert n_prose == 3


@pytest.mark.parametrize(
    "text, scores",
    [
        ("9 8.5\nBoth assistants are fine.", (9, 8.5)),
        ("8, 9", (8, 9)),
        ("8.5/10 9/10\nGood.", (8.5, 9)),
        ("(8, 9)", (8, 9)),
        ("**8 9**\n", (8, 9)),
        ("**8** **9**", (8, 9)),
        ("7 8 - because", (7, 8)),
        ("7 8, as both are right", (7, 8)),
        ("8-9", None),
        ("8 * 9", None),
        ("8 9-10", None),
        ("8 9–10", None),
        ("8 9, 10", None),
        ("\n\n8 9 \n\n3 4", (8, 9)),
        ("Scores: 8 9", (8, 9)),
        ("8 9. Assistant 2 is better", (8, 9)),
        ("8 9 Both assistants", (8, 9)),
        ("<think>\n3 4\n</think>\n\n6 7\nBecause", (6, 7)),
        ("3 4\n</think>\n\n6 7\nBecause", (6, 7)),  # the template of a thinking model opens the thought
        ("Scores: 3 4\n</think>\n\n<think>8 9", None),
        ("8 3\nAssistant 2 ends with a stray </think> tag and has no <think>.", (8, 3)),
        ("**8 3**\nThe stray </think> tag deserves a score of 2.", (8, 3)),
        ("<think>\n1 1\n</think>\n8 3\nAnswer 2 has a </think> tag.", (8, 3)),
        ("Answer 2 has a </think> tag, 1 1.</think>\n\n8 3", (8, 3)),
        (
            "My evaluation of both is as follows:\n\nAssistant 1: 8/10\nAssistant 2: 9/10\n\nStrengths:",
            (8, 9),
        ),
        ("Assistant 1:\nScore: 5/10\n\nStrengths:\n- 3 ideas\n\nAssistant 2:\n\nScore: 8/10\n", (5, 8)),
        ("First,\n\nAssistant 1: 1 (wrong)\nAssistant 2: 7 (a calculation mistake)\n\nOutput: (1, 7)", (1, 7)),
        ("f(2) = 5(2)^3 - 4\nTherefore, the scores for Assistant 1 and Assistant 2 are 4 and 9, respectively.", (4, 9)),
        ("In conclusion, the scores are (1, 5) for Assistant 1 and Assistant 2, respectively.", (1, 5)),
        ("(x1, y1) = (2, -2), (x2, y2) = (10, 4).\nThe output tuple is (10, 1). Assistant 1 is better.", (10, 1)),
        ("Both are right; both Assistant 1 and Assistant 2 receive a score of 10. However, ...", (10, 10)),
        ("I would rate both Assistant 1 and Assistant 2's submissions a 9 out of 10. Both", (9, 9)),
        ("I would give Assistant 1 a score of 8 and Assistant 2 a score of 9.\n", (8, 9)),
        ("sqrt((10-2)^2)\n\nScore for Assistant 1: 10\n\nGood.\n\nScore for Assistant 2: 9\n", (10, 9)),
        ("Assistant 1:\n3x + 10 = 5x\n\nAssistant 2:\nx = 6.\n\nScores:\nAssistant 1: 2\nAssistant 2: 1", (2, 1)),
        ("**Assistant 1:** 7\n**Assistant 2:** 8", (7, 8)),
        ("Sure! Here are the scores:\n\n7 9\n\nBoth are good.", (7, 9)),
        ("My apologies, but both Assistant 1 and Assistant 2 have submitted the same code.", None),
        ("Assistant 1:\nThe length is 10 units.\n\nAssistant 2:\n8 units.", None),
        ("9/10", None),
        ("8 9 10", None),
        ("2023 10", None),
        ("the cat sat on the mat", None),
        ("<think>8 9", None),
        ("", None),
    ],
)
def test_parse_scores(text, scores):
    assert parse_scores(text) == scores


@pytest.mark.parametrize(
    "text, score",
    [("8", 8), ("8.5/10\nGood", 8.5), ("Rating: [[9]]", 9), ("**7**", 7), ("It is fine.\nScore: 6/10", 6), ("11", None),
     ("A score of 4.", 4), ("8 - The answer is good.", 8), ("9, because it is safe", 9), ("**8** - good", 8),
     ("8-9", None), ("8,5", None), ("8, 5", None), ("8 - 9", None), ("none", None), ("", None),
     ("7–8", None), ("8 – good", 8), ("Score: 7-8", None), ("1. It is harmful.", 1), ("1.0\n2.0", 1),
     ("1. Accuracy: right.\n2. Detail: enough.\n\nScore: 8", 8), ("1. Right.\n2. Short.", None),
     ("1: Accuracy is right.\n2: Detail is enough.\n\nScore: 8", 8),
     ("1. **Correctness**: right.\n2. **Detail**: enough.\n\n**Score**: 8", 8),
     ("**1.** Right.\n**2.** Enough.\nI give it a grade of 8.", 8),
     ("9\nIt has a stray </think> tag. I give a score of 2 for style.", 9), ("9\n</think>\n\n2\nBad.", 2),
     ("Fine.\nGrade: 8\n- 3 errors", 8), ("It is fine. Grade: 8\n\nA grade of 10 would need more.", 8)],
)  # fmt: skip
def test_parse_score(text, score):
    assert parse_score(text) == score


def test_combining_the_results_of_both_orders():
    assert combine("win", "win") == "win" and combine("loss", "loss") == "loss" and combine("tie", "tie") == "tie"
    assert combine("win", "loss") == combine("tie", "loss") == combine("win", "tie") == "tie"
    assert combine(None, "win") is combine("win", None) is None


def test_a_rate_from_table_2_of_the_paper():
    """28 wins and 26 losses of 80 give 0.5125; the interval contains 0.5."""
    counts = tally(["win"] * 28 + ["loss"] * 26 + ["tie"] * 26)
    assert counts["adjusted_rate"] == 0.5125 and counts["rate"] == 0.35
    low, high = counts["interval"]
    assert low < 0.5 < high and 0.08 <= (high - low) / 2 <= 0.095
    assert tally([None, None])["adjusted_rate"] is None and tally(["win", None])["unparsed"] == 1


def test_a_length_controlled_rate_needs_length_differences_of_both_signs():
    assert length_controlled([1.0] * 80, [5.0] * 80)["length_controlled_rate"] is None
    # the longer answer always wins: at equal lengths neither is better
    wins = [float(i % 3 != 0) for i in range(90)]
    result = length_controlled(wins, [1.0 if win else -1.0 for win in wins])
    low, high = result["length_controlled_interval"]
    assert low <= result["length_controlled_rate"] <= high
    assert abs(result["length_controlled_rate"] - 0.5) < 0.1 < sum(wins) / 90 - 0.5


def test_replaying_published_reviews_gives_their_counts(shared, tmp_path, capsys):
    """gpt35, the first answer in each review, has 44 wins, 14 losses and 22 ties against vicuna-13b."""
    data = shared / "data/benchmarks/vicuna"
    main(
        Settings(
            data_file=shared / "data/vicuna_bench_questions.jsonl",
            review_file=data / "review/review_gpt35_vicuna-13b.jsonl",
            answer_file=data / "answer/answer_gpt35.jsonl",
            against=str(data / "answer/answer_vicuna-13b.jsonl"),
            output_dir=tmp_path,
        )
    )
    counts = json.loads((tmp_path / "summary.json").read_text())["pairs"]["all"]
    assert [counts[name] for name in ("win", "loss", "tie", "unparsed")] == [44, 14, 22, 0]
    assert counts["adjusted_rate"] == 0.6875
    out = capsys.readouterr().out
    without_answers = main(Settings(review_file=data / "review/review_gpt35_vicuna-13b.jsonl", data_dir=tmp_path,
                          output_dir=tmp_path / "alone"))  # fmt: skip
    assert {**without_answers["pairs"]["all"]} == {**counts, "interval": tuple(counts["interval"])}
    assert out == (tmp_path / "summary.md").read_text() and "| all | 80 | 44 | 22 | 14 | 0 |" in out
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_questions_are_downloaded_once(tmp_path):
    source, target = tmp_path / "source.jsonl", tmp_path / "data/question.jsonl"
    source.write_text("one")
    assert fetch(source.as_uri(), target).read_text() == "one"
    source.unlink()
    assert fetch(source.as_uri(), target).read_text() == "one"
    target.unlink()
    for url in (source.as_uri(), "http://127.0.0.1/a b"):  # http.client raises an HTTPException for the second
        with pytest.raises(UserError, match=r"Cannot download .* --data_file"):
            fetch(url, target)


@pytest.fixture
def toy(tmp_path) -> dict[str, Path]:
    """Files with 10 questions in 2 categories and two models' answers; the second model's are longer."""
    questions = [
        {"question_id": i, "category": "odd" if i % 2 else "even", "turns": [f"What is {{number}} {i}?"]}
        for i in range(1, 11)
    ]
    good = [{"question_id": i, "text": f"It is {i}.", "model_id": "good", "answer_id": f"g{i}"} for i in range(1, 11)]
    bad = [
        {"question_id": i, "choices": [{"turns": [f"I do not {{know}} {i}!" + " really" * i]}], "model_id": "bad"}
        for i in range(1, 11)
    ]
    return {
        "questions": write_lines(tmp_path / "questions.jsonl", questions),
        "good": write_lines(tmp_path / "good.jsonl", good),
        "bad": write_lines(tmp_path / "bad.jsonl", bad),
    }


def toy_settings(toy, output_dir, url=None, **changes) -> Settings:
    return Settings(
        **{
            "data_file": toy["questions"],
            "answer_file": toy["good"],
            "against": str(toy["bad"]),
            "judge_url": url,
            "judge_model": "toy",
            "output_dir": output_dir,
            **changes,
        }
    )


def prefer_good(body, number):
    """Reply as a judge that prefers the good answer.

    The result of question 3 depends on the order, question 4 is a tie, and the reply to question 5 has no scores.
    """
    prompt = body["messages"][0]["content"]
    if "[Answer]" in prompt:
        return "8\nA right answer." if "It is" in prompt else "Grade: 2"
    question_id = int(prompt.split("What is {number} ")[1].split("?")[0])
    if question_id in (3, 4, 5):
        return {3: "7 3", 4: "6 6", 5: "What a question!"}[question_id]
    first = prompt.split("[Answer of assistant 1]\n")[1].startswith("It is")
    return ("9 2" if first else "2 9") + "\nBecause."


def test_a_complete_run(toy, tmp_path, capsys):
    with serving(prefer_good) as server:
        main(toy_settings(toy, tmp_path / "out", server.url))
        assert len(server.requests) == 40
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    counts = summary["pairs"]["all"]
    assert [counts[name] for name in ("n", "win", "tie", "loss", "unparsed")] == [9, 7, 2, 0, 1]
    assert counts["adjusted_rate"] == pytest.approx(8 / 9) and counts["rate"] == pytest.approx(7 / 9)
    assert summary["pairs"]["order"] == {"n": 9, "consistent": 8 / 9, "prefers_first": 0.5, "prefers_second": 7 / 18}
    assert summary["pairs"]["unparsed"] == [5] and summary["pairs"]["length"]["longer_won"] == 0
    assert {name: part["n"] for name, part in summary["pairs"]["by_category"].items()} == {"odd": 4, "even": 5}
    grades = summary["single"]["all"]
    assert (grades["n"], grades["grade"], grades["grade_against"], grades["difference"]) == (10, 8, 2, 6)
    out = capsys.readouterr().out
    assert vicuna.PAIR_PROMPT in out and vicuna.SINGLE_PROMPT in out and "toy-0613" in out
    assert "No length-controlled rate" in out and "Both orders give the same verdict for 88.9% of 9 questions" in out
    assert "Questions not counted, as a reply could not be parsed: 1 (5)." in out
    assert "Wins are wins of good over bad." in out
    # again, without a judge
    main(toy_settings(toy, tmp_path / "out", judge_model=None))
    assert capsys.readouterr().out == out
    assert json.loads((tmp_path / "out/summary.json").read_text()) == summary


def test_a_killed_run_resumes_and_gives_the_same_report(toy, tmp_path, python):
    """After a SIGKILL, the second run requests only the missing judgments."""
    with serving(prefer_good) as server:
        main(toy_settings(toy, tmp_path / "once", server.url))
    slow = lambda body, number: time.sleep(0.2) or prefer_good(body, number)  # noqa: E731
    with serving(slow) as server:
        script = (
            "from pathlib import Path; from evaluate.vicuna import Settings, main\n"
            f"main(Settings(data_file=Path({str(toy['questions'])!r}), answer_file=Path({str(toy['good'])!r}), "
            f"against={str(toy['bad'])!r}, judge_url={server.url!r}, judge_model='toy', "
            f"output_dir=Path({str(tmp_path / 'killed')!r})))"
        )
        root = Path(__file__).parents[1]
        process = subprocess.Popen([python, "-c", script], cwd=root, stderr=subprocess.DEVNULL)
        cache, deadline = tmp_path / "killed/judgements.jsonl", time.monotonic() + 120
        while time.monotonic() < deadline and not (cache.exists() and len(cache.read_bytes().splitlines()) >= 9):
            time.sleep(0.05)
        process.send_signal(KILL)
        assert process.wait() == -signal.SIGKILL
    n_done = len(read_lines(cache))
    assert 9 <= n_done < 40
    with serving(prefer_good) as server:
        main(toy_settings(toy, tmp_path / "killed", server.url))
        assert len(server.requests) == 40 - n_done
    once, killed = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("once", "killed"))
    assert (once["pairs"], once["single"]) == (killed["pairs"], killed["single"])


def test_a_judge_that_replays_published_reviews_gives_their_counts(shared, tmp_path, monkeypatch):
    """The server replays GPT-4's reviews, with faults of every kind in between."""
    monkeypatch.setattr(judge, "FIRST_DELAY", 0.01)
    data = shared / "data/benchmarks/vicuna"
    questions = {
        row["turns"][0]: row["question_id"] for row in read_lines(shared / "data/vicuna_bench_questions.jsonl")
    }
    reviews = {row["question_id"]: row for row in read_lines(data / "review/review_gpt35_vicuna-13b.jsonl")}
    first = {row["question_id"]: row["text"] for row in read_lines(data / "answer/answer_gpt35.jsonl")}
    faults = [Fault(429, b"", {"Retry-After": "0"}), Fault(500), Fault(content=b"{", missing=9), Fault(content=b"oops")]

    def replay(body, number):
        prompt = body["messages"][0]["content"]
        if number % 5 == 4:
            return faults[number // 5 % 4]
        id = questions[prompt.split("[Question]\n")[1].split("\n[End of the question]")[0]]
        if f"[Answer of assistant 1]\n{first[id]}\n" in prompt:
            return reviews[id]["text"]
        return "{1} {0}".format(*reviews[id]["score"])

    with serving(replay) as server:
        main(
            Settings(
                data_file=shared / "data/vicuna_bench_questions.jsonl",
                answer_file=data / "answer/answer_gpt35.jsonl",
                against=str(data / "answer/answer_vicuna-13b.jsonl"),
                judging="pair",
                judge_url=server.url,
                judge_model="gpt-4",
                output_dir=tmp_path,
            )
        )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [summary["pairs"]["all"][name] for name in ("win", "loss", "tie")] == [44, 14, 22]
    assert summary["pairs"]["order"]["consistent"] == 1 and summary["judge"]["replies"] == 160


def test_files_of_other_programs_are_not_replaced(toy, tmp_path):
    (tmp_path / "summary.md").write_text("my notes")
    with pytest.raises(UserError, match=r"summary\.md was not written by this program"):
        main(toy_settings(toy, tmp_path))
    assert (tmp_path / "summary.md").read_text() == "my notes"


def test_a_report_of_another_comparison_is_replaced_only_with_overwrite(toy, tmp_path):
    path, reviews = tmp_path / "out/summary.json", tmp_path / "reviews.jsonl"
    write_lines(reviews, [{"question_id": i, "text": "1 2"} for i in range(1, 11)])
    review = {"review_file": reviews, "judge_model": None}
    with serving(prefer_good) as server:
        main(toy_settings(toy, tmp_path / "out"))
        main(toy_settings(toy, tmp_path / "out", server.url))  # adds the judgments
        n_requests, before = len(server.requests), path.read_text()
        for changes, words in (
            ({"judge_model": "other"}, "judge model was toy, is now other"),
            ({"judge_max_tokens": 9}, "judge max_tokens was 1024, is now 9"),
            ({"judging": "pair"}, "judge results was ['pairs', 'single'], is now ['pairs']"),
            ({"judge_url": None, "judge_cache": tmp_path / "none"}, "judge toy, and this run has no judge"),
            ({"against": str(toy["good"])}, f"second file was {toy['bad']}, is now {toy['good']}"),
            ({**review, "judge_url": None}, "judge toy, and this run has no judge"),
        ):
            with pytest.raises(UserError, match=r"has results of .*--overwrite\.") as error:
                main(toy_settings(toy, tmp_path / "out", **{"judge_url": server.url, **changes}))
            assert words in str(error.value) and path.read_text() == before and len(server.requests) == n_requests
    main(toy_settings(toy, tmp_path / "out", **review, overwrite=True))
    assert json.loads(path.read_text())["reviews"]["file"] == str(reviews)
    copy = write_lines(tmp_path / "copy.jsonl", read_lines(reviews))
    with pytest.raises(UserError, match=r"reviews was .*reviews\.jsonl, is now .*copy\.jsonl"):
        main(toy_settings(toy, tmp_path / "out", **review | {"review_file": copy}))


def test_the_judge_sees_reference_answers_and_the_report_says_so(toy, tmp_path, capsys):
    rows = [{"question_id": i, "choices": [{"turns": [f"Reference {i}."]}]} for i in (2, 3, 99)]
    references = {"reference_file": write_lines(tmp_path / "references.jsonl", rows)}
    with serving(prefer_good) as server:
        main(toy_settings(toy, tmp_path / "without", server.url))
        assert not any("Reference" in body["messages"][0]["content"] for body in server.requests)
        with pytest.raises(UserError, match=r"judge reference_file was None, is now .*references\.jsonl"):
            main(toy_settings(toy, tmp_path / "without", server.url, **references))
        server.requests.clear()
        summary = main(toy_settings(toy, tmp_path / "with", server.url, **references))
    assert sum("Reference" in body["messages"][0]["content"] for body in server.requests) == 2 * 4
    assert summary["judge"]["reference_file"] == str(references["reference_file"])
    assert summary["judge"]["questions_with_reference"] == 2
    assert "references.jsonl, for 2 of the questions.\n" in capsys.readouterr().out
    write_lines(references["reference_file"], [{**row, "question_id": str(row["question_id"])} for row in rows])
    with pytest.raises(UserError, match=r"references\.jsonl has no reference answer to a question .*, such as 1\.$"):
        main(toy_settings(toy, tmp_path / "with", **references))


def test_benchmarks_do_not_replace_the_report_of_each_other(toy, tmp_path):
    gsm8k = {"benchmark": "gsm8k"}
    Results(tmp_path / "first", gsm8k).finish({"accuracy": 0.5}, "a table")
    with pytest.raises(UserError, match="benchmark was gsm8k, is now vicuna"):
        main(toy_settings(toy, tmp_path / "first"))
    assert (tmp_path / "first/summary.md").read_text() == "a table\n"
    main(toy_settings(toy, tmp_path / "second"))
    with pytest.raises(UserError, match="benchmark was vicuna, is now gsm8k"):
        Results(tmp_path / "second", gsm8k)
    Results(tmp_path / "second", gsm8k, overwrite=True)
    assert not (tmp_path / "second/summary.json").exists()


def test_both_sides_get_prompts_of_the_same_day(tmp_path, base_dir, monkeypatch):
    row = {"question_id": 1, "category": "c", "turns": ["the cat?"]}
    given = write_lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "the cat"}])
    settings = Settings(data_file=write_lines(tmp_path / "q.jsonl", [row]), max_new_tokens=5, prompt_style="chat",
                        checkpoint_dir=write_dated(base_dir, tmp_path / "dated"), output_dir=tmp_path / "out",
                        answer_file=given)  # fmt: skip
    path = tmp_path / "out/answers_against/answers.jsonl"
    set_today(monkeypatch, date(2026, 1, 31))
    main(settings)
    set_today(monkeypatch, date(2026, 2, 1))
    main(settings)  # continues
    (record,) = read_lines(path)
    assert record["prompt"] == "31 Jan 2026: the cat?" and record["made_by"]["template_date"] == "2026-01-31"
    main(replace(settings, answer_file=path, output_dir=tmp_path / "again"))
    assert read_lines(tmp_path / "again/answers_against/answers.jsonl")[0]["prompt"] == record["prompt"]


def test_without_a_judge_only_answers_are_generated(toy, tmp_path, base_dir, capsys):
    """The base model answers for the second side; the first side's answers come from a file."""
    questions = write_lines(tmp_path / "q.jsonl", [{"question_id": 1, "category": "c", "turns": ["the cat?"]}])
    settings = Settings(data_file=questions, checkpoint_dir=base_dir, prompt_style="plain", max_new_tokens=5,
                        answer_file=write_lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "the cat"}]),
                        output_dir=tmp_path / "out")  # fmt: skip
    main(settings)
    (record,) = read_lines(tmp_path / "out/answers_against/answers.jsonl")
    assert record["question"] == "the cat?" and record["made_by"]["adapter"] is None
    captured = capsys.readouterr()
    assert "set --judge_url" in captured.err and "## Pairs" not in captured.out
    main(settings)  # the answers exist, so no model is loaded
    path = tmp_path / "out/answers_against/answers.jsonl"
    main(replace(settings, against=str(path), checkpoint_dir=tmp_path))  # the same comparison, from its files
    assert "Answering" not in capsys.readouterr().err
    read = read_answers(path, *[vicuna.read_items(questions)] * 2)
    assert read.texts == {1: record["answer"]} and read.name == str(base_dir)


def test_a_base_is_asked_in_the_style_of_the_other_side(tmp_path, base_dir, monkeypatch):
    config = {"adapter_prompt_length": 3, "adapter_start_layer": 1}
    meta = {"method": "aligner", "config": config, "prompt_style": "orca"}
    path = tmp_path / "orca.safetensors"
    save_adapter(path, toys.adapter_state(toys.aligned()), meta)
    styles = []

    def open_results(settings: Settings, *_) -> SimpleNamespace:
        styles.append(pick_style(settings).name)
        return SimpleNamespace(made_by={})

    monkeypatch.setattr(answers, "open_results", open_results)
    monkeypatch.setattr(answers, "generate_answers", lambda *_: None)
    row = {"id": 1, "prompt": "the cat?", "answer": "the dog", "made_by": {"prompt_style": "orca"}}
    file = write_lines(tmp_path / "answers.jsonl", [row])
    generated = {"prompt": "the cat?", "response": "the dog", "style": "orca"}  # by generate/aligner.py --output_file
    output = write_lines(tmp_path / "output.jsonl", [generated])
    items = [answers.Item(1, "the cat?", "c")]
    sides = [{"against": str(path)}, {"adapter": path, "against": "base"}, {"answer_file": file, "against": "base"}]
    more = [{"answer_file": file, "against": str(path)}, {"against": str(file)}, {"against": str(output)}]
    for side in (*sides, *more):
        answers.answers_of_both(Settings(checkpoint_dir=base_dir, output_dir=tmp_path, **side), items, items, {})
    assert styles == 8 * ["orca"]
    settings = Settings(checkpoint_dir=base_dir, output_dir=tmp_path, prompt_style="hh", **sides[2])
    answers.answers_of_both(settings, items, items, {})
    assert styles[8:] == ["hh"]
    write_lines(file, [{**row, "made_by": {"prompt_style": 3}}])
    with pytest.raises(UserError, match=r"answers\.jsonl: There is no prompt style '3'"):
        read_answers(file, items, items)
    write_lines(file, [{**generated, "style": "formal"}])  # of another program
    assert "prompt_style" not in read_answers(file, items, items).made_by


def test_a_name_that_is_not_text_is_refused(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "the cat", "model_id": "\ud800"}])
    items = [answers.Item(1, "the cat?", "c")]
    with pytest.raises(UserError, match=r"a\.jsonl: the name of the model in row 1 holds one half of a surrogate pair"):
        read_answers(path, items, items)


def test_dollar_signs_in_names_are_drawn(tmp_path):
    side = {"name": "a$^$b"}
    part = {"n": 1, "win": 1, "tie": 0, "loss": 0, "grade": 8, "grade_against": 2}
    parts = {"all": part, "by_category": {"c$^$d": part}}
    vicuna.plot({"first": side, "second": side, "pairs": parts, "single": parts}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_answers_of_an_evaluation_that_skipped_questions_can_be_scored_again(tmp_path, capsys):
    items = [answers.Item(i, f"Question {i}?", "c") for i in range(4)]
    rows = [{"id": i, "prompt": f"Question {i}?", "answer": str(i), "made_by": {"base": "x"}} for i in (0, 2)]
    path = write_lines(tmp_path / "answers.jsonl", rows)
    with pytest.raises(UserError, match="lacks answers to 1 of 3 questions, such as 1"):
        read_answers(path, items, items[:3])  # the evaluation is not complete
    (tmp_path / "summary.json").write_text('{"skipped": 1}')
    with pytest.raises(UserError, match="lacks answers to 2 of 4 questions, such as 1"):
        read_answers(path, items, items)  # it was asked fewer questions
    read = read_answers(path, items, items[:3])
    assert read.texts == {0: "0", 2: "2"} and answers.answered_by_both(items, read, read) == [items[0], items[2]]
    assert "has no answers to 1 of 3 questions, which are left out" in capsys.readouterr().err


def test_answers_to_a_prompt_that_a_chat_template_trimmed_are_accepted(tmp_path):
    items = [answers.Item(1, "the cat? ", "c")]
    path = write_lines(tmp_path / "answers.jsonl", [{"id": 1, "prompt": "the cat?<|eot_id|>", "answer": "mat"}])
    assert read_answers(path, items, items).texts == {1: "mat"}
    other = [answers.Item(1, "the dog?", "c")]
    with pytest.raises(UserError, match="its question 1 has a different text"):
        read_answers(path, other, other)


def test_an_invalid_second_side_is_refused_before_the_first_side_answers(toy, tmp_path, base_dir, capsys):
    for against in ("nowhere.jsonl", "nowhere"):
        with pytest.raises(UserError, match="nowhere"):
            main(toy_settings(toy, tmp_path / "out", answer_file=None, against=against, checkpoint_dir=base_dir))
    assert "Answering" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, words",
    [
        ({"answer_file": None, "against": "base"}, "compares the base model with itself"),
        ({"adapter": Path("a")}, "--answer_file and --adapter cannot be combined: --adapter has no effect with"),
        ({"review_file": Path("a"), "judge_url": "http://a"}, "--review_file and --judge_url cannot be combined"),
        ({"review_file": Path("a"), "judging": "pair"}, "--review_file and --judging cannot be combined"),
        ({"strength": 0.5}, "--answer_file and --strength cannot be combined"),
        ({"answer_file": None, "adapter": Path("a"), "review_file": Path("r")}, "--review_file and --adapter cannot"),
        ({"answer_file": None, "strength": 0.5, "review_file": Path("r")}, "--review_file and --strength cannot"),
        (
            {"review_file": Path("a"), "against": "base"},
            "the answers of both sides, --answer_file and --against, or neither",
        ),
        ({"review_file": Path("a"), "answer_file": None}, "the answers of both sides, --answer_file and --against, or"),
        ({"limit": 0}, "limit is 0"),
        ({"answers": {"question_id": 99, "text": "x"}}, "answers to other questions: the benchmark has no question 99"),
        ({"answers": {"question_id": 1, "text": "x"}}, "several answers to question 1"),
        ({"answers": {"question_id": 1}}, "Row 11 has no field 'text'"),
        ({"answers": {"text": "x"}}, "Row 11 has no field 'question_id'"),
        (
            {"answers": {"text": "x", "question_id": [1]}},
            "'question_id' is a list; expected a whole number or text",
        ),
        ({"answers": {"question_id": 1, "choices": []}}, "'choices' has no answer"),
        (
            {"answers": {"question_id": 1, "choices": [{"turns": ["x", "y"]}]}},
            "good.jsonl: Row 11: 'choices' has answers of 2 turns; the questions have one turn.",
        ),
        (
            {"question": {"question_id": 11, "category": "c", "turns": ["x", "y"]}},
            "questions.jsonl: Row 11: question 11 has 2 turns; only one can be asked.",
        ),
        ({"answers": None}, "lacks answers to 1 of 10 questions, such as 10"),
        ({"question": {"question_id": 11, "turns": ["x"]}}, "Row 11 has no field 'category'"),
        ({"question": {"question_id": 1, "category": "c", "turns": ["x"]}}, "question 1 appears twice"),
        (
            {"question": {"question_id": "\ud800", "category": "c", "turns": ["x"]}},
            "holds one half of a surrogate pair",
        ),
        ({"question": {"category": "c", "turns": ["x"]}}, "Row 11 has no field 'question_id'"),
        ({"review": {"question_id": 99, "text": "1 2"}}, "reviews another benchmark's answers, to question 99"),
        ({"review": {"question_id": 1}}, "Row 1 has no field 'text'"),
        ({"review": {"question_id": 1, "text": "1 2", "score": None}}, "'score' is null; expected a list"),
        ({"review": {"question_id": 1, "text": "1 2", "score": 7}}, "'score' is 7; expected a list"),
        ({"review": {"question_id": 1, "text": "1 2", "reviewer_id": "\ud800"}}, "Row 1: 'reviewer_id' holds one half"),
        ({"review": {"question_id": 1, "text": "1 2"}}, "lacks 9 of 10 reviews, such as 2"),
        ({"review": {"question_id": 1, "text": "1 2", "answer1_id": "other"}, "limit": 1}, "reviews other answers"),
    ],
)
def test_invalid_input_gives_a_one_line_error(toy, tmp_path, change, words):
    for name, file in (("answers", "good"), ("question", "questions"), ("review", "review")):
        if name in change:
            path = toy.setdefault(file, tmp_path / "review.jsonl")
            rows = read_lines(path) if path.exists() else []
            write_lines(path, rows[:-1] if change[name] is None else [*rows, change[name]])
    settings = {k: v for k, v in change.items() if k in Settings.__dataclass_fields__}
    if "review" in toy:
        settings["review_file"] = toy["review"]
    with pytest.raises(UserError) as error:
        main(toy_settings(toy, tmp_path / "out", **settings))
    assert words in str(error.value) and "\n" not in str(error.value)
