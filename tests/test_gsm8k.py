"""GSM8K: extraction of the final number of a solution, and the evaluation from rows to summary."""

import json
from datetime import date
from decimal import Decimal
from fractions import Fraction

import pytest
from chat_models import set_today, write_dated
from hypothesis import given
from hypothesis import strategies as st

from evaluate import gsm8k
from evaluate.gsm8k import EXAMPLE, Settings, extract_answer
from lit_llama.prompts import get_prompt_style
from lit_llama.utils import UserError

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def test_published_solutions_are_scored_as_published(shared):
    """Compare with OpenAI's labels for the solutions of four models."""
    path = shared / "data/benchmarks/gsm8k/example_model_solutions_first_400.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    compared = 0
    for row in rows:
        gold = extract_answer(row["ground_truth"])
        for model in MODELS:
            solution = row[model]["solution"]
            assert (extract_answer(solution) == gold) == row[model]["is_correct"], solution
            compared += 1
    assert compared == 1600


@pytest.mark.parametrize("split, count", [("train", 7473), ("test", 1319)])
def test_the_number_of_every_reference_answer_is_extracted(shared, split, count):
    lines = (shared / f"data/gsm8k_{split}.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == count
    assert [extract_answer(a) for a in answers] == [a.split("#### ")[1].replace(",", "") for a in answers]


def test_metamath_answers(shared):
    rows = json.loads((shared / "data/benchmarks/gsm8k/metamathqa_4rows.json").read_text())
    assert [extract_answer(row["response"]) for row in rows] == [None, "752", "75", "7"]  # the first is \\sqrt{5}


@pytest.mark.parametrize(
    "text, number",
    [
        ("The answer is: 18", "18"),
        ("#### 752\nThe answer is: 752", "752"),
        ("#### 1,200.", "1200"),
        ("#### -3", "-3"),
        ("A: 18 dollars", "18"),
        ("A: 5.0", "5"),
        ("A: -$5", "-5"),
        ("A: $-5", "-5"),
        ("**Answer:** $18", "18"),
        ("The final answer is **1,234.50**.", "1234.5"),
        ("Final answer: 100%", "100"),
        ("The answer is:\n18", "18"),
        ("The answer is 18. So in 7 days she makes 126.", "18"),
        ("The answer is 18 (2 * 9 = 18).", "18"),
        ("The answer is 18 because 2 * 9 is 18, and 3 * 6 too.", "18"),
        ("The answer is: 3 + 4 = 7", "7"),
        ("The answer is: x = 75", "75"),
        ("The answer is: 30 = 5 * 6", "30"),
        ("The answer is: x = 30 = 5 * 6", "30"),
        ("The answer is: -2 = 3 - 5", "-2"),
        ("#### 42 = 6 x 7", "42"),
        ("#### 18 dollars = 2 * 9 dollars", "18"),
        ("#### 1/2 = 2/4", "0.5"),
        ("#### 3 hours = 180 minutes", "180"),
        ("A: 2 dozen = 24 eggs, and 24 * 2 = 48 dollars in 2 days", "48"),
        ("The answer is that 3 pears and 5 apples make 8", "8"),
        (r"Thus she pays $\boxed{18\text{ dollars}}$ in 7 days.", "18"),
        (r"\boxed{\frac{3}{4}}", "0.75"),
        (r"The answer is: -\frac{1}{2}", "-0.5"),
        (r"The answer is: \frac{-1}{2}", "-0.5"),
        (r"\boxed{\frac{-1}{2}}", "-0.5"),
        (r"\boxed{\frac{1}{-2}}", "-0.5"),
        (r"\boxed{\frac{-1}{-2}}", "0.5"),
        (r"The answer is: 5\frac{1}{2}", "5.5"),
        (r"The answer is: \frac12", "0.5"),
        (r"The answer is: 10{,}000", "10000"),
        (r"The answer is $1.5 \times 10^3$", "1500"),
        (r"The answer is: \$18", "18"),
        (r"The answer is: 50\%", "50"),
        ("A: 5 1/2", "5.5"),
        ("A: 2/6", "1/3"),
        ("A: 5/1", "5"),
        ("A: 1.5e3", "1500"),
        ("A: .5", "0.5"),
        ("A: 007", "7"),
        ("A: -0.0", "0"),
        ("So she makes $18.", "18"),
        ("So it is 20% of £3.20.", "3.2"),
        ("It falls to −7 degrees.", "-7"),
        # a dash that is no sign
        ("Total:\n- 18", "18"),
        ("Answer:\n- 18", "18"),
        ("Total cost - $18", "18"),
        ("20 - 2", "2"),
        ("10-5", "5"),
        # degrees and squares of units
        (r"The answer is: 84^\circ", "84"),
        (r"The angle is $-84^{\circ}$.", "-84"),
        (r"\boxed{84^{\circ}}", "84"),
        (r"\boxed{84^\circ\text{F}}", "84"),
        ("It is 84°F.", "84"),
        ("So the area is 18 cm^2.", "18"),
        (r"So the volume is $18\text{ m}^{3}$.", "18"),
        ("So it is 2^{10}", None),
        # the words of an answer marker in the middle of a solution
        ("A: She sells 9 eggs for $2 each, so she makes 18", "18"),
        ("Answer: 16 - 3 - 4 = 9 eggs. They sell for 9 * 2 = $18.", "18"),
        ("#### Step 1\nMultiply.\nThe total is 18.", "18"),
        ("If we know the answer to the above question is 72, what is x?\nThe answer is: 7", "7"),
        # GSM8K's annotations
        ("So 2 * 9 = <<2*9=18>>18\nA: 18", "18"),
        ("So 2 * 9 = <<2*9=18>>18 eggs, and 18 * 3", None),
        # no number
        (r"The answer is: \sqrt{5}", None),
        (r"The answer is: 3\pi", None),
        (r"The answer is: 2^{10}", None),
        ("1/0", None),
        ("The answer is: (3,4)", None),
        (r"\boxed{(-3, 4)}", None),
        ("The answer is: 1,5", None),
        ("The answer is: 1,2345", None),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_the_final_number_is_extracted(text, number):
    assert extract_answer(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "18", " -3.5.", "1,200", r"1,\!200", "$18", r"-\$18.50", "€ 5", "50%", r"50\%", "18 dollars",
        "5 miles per hour.", r"18\text{ cm}", "x = 75", "y=-2", r"\frac{3}{4}", r"-\frac12", r"5\frac{1}{2}", "5 1/2",
        "2/3", r"2 \times 10^3", r"90^\circ", r"90^{\circ}", "90°", r"45^\circ.",
    ],
)  # fmt: skip
def test_a_number_with_its_unit_is_only_a_number(text):
    assert gsm8k.states_one_number(text) and extract_answer(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        "", "none", "x+3", "x + 3", "2x", "5-x", r"\frac{x}{2}", r"\frac{1}{x}", r"\frac{\pi}{2}", r"(-\infty, 3)",
        r"x \le 3", "10!", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "3 + 4i", "3, 4", "(3, 4)", "3 and 4", r"5\sqrt{2}",
        r"3\pi", "2^{10}", r"\sin 90^\circ", "52_8", "6:30", "y = 2x", "5 = x", "xy = 3", r"0.\overline{3}",
    ],
)  # fmt: skip
def test_an_expression_is_not_only_a_number(text):
    assert not gsm8k.states_one_number(text)


decimals = st.decimals(-(10**9), 10**9, places=3)
integers = st.integers(0, 10**12)
wrappers = st.sampled_from(
    ["The answer is: {}", "The answer is {}.", "#### {}", "A: {}", "Answer: {}", "\\boxed{{{}}}", "So she has {}",
     "#### {}\nThe answer is: {}", "The answer is: ${}$", "the answer is **{}**", "A: {}."]
)  # fmt: skip
steps = st.lists(st.sampled_from(["She has 3 eggs.", "Then 4 * 5 = 20.", "Half of them is 10", "A day has 24 hours."]))


@given(value=decimals, wrapper=wrappers, before=steps)
def test_all_spellings_of_a_number_give_the_same_answer(value, wrapper, before):
    """With and without commas, trailing zeros, and units, regardless of the preceding text."""
    expected = extract_answer(f"A: {value:f}")
    assert Decimal(expected) == value and not (expected.endswith("0") and "." in expected)
    for spelling in (f"{value:f}", f"{value:,f}", f"{value:f}00", f"{value:f} dollars", f"{value:f}%"):
        assert extract_answer("\n".join([*before, wrapper.replace("{}", spelling).format()])) == expected


@given(above=integers, below=st.integers(1, 10**6), negative=st.booleans())
def test_fractions_keep_their_value(above, below, negative):
    sign = "-" if negative else ""
    expected = Fraction(above, below) * (-1 if negative else 1)
    plain = extract_answer(f"The answer is: {sign}{above}/{below}")
    assert Fraction(plain) == expected
    assert extract_answer(f"The answer is: {sign}\\frac{{{above}}}{{{below}}}") == plain
    assert extract_answer(f"A: {plain}") == plain


@given(st.text())
def test_any_text_gives_a_normalized_number_or_none(text):
    number = extract_answer(text)
    if number is not None:
        assert extract_answer(number) == number


def test_a_long_run_of_digits_is_parsed_quickly():
    assert len(extract_answer("The answer is: " + "3" * 20_000)) == 20_000
    assert extract_answer("The answer is: 0." + "3" * 20_000 + " " * 20_000) == "0." + "3" * 20_000


def test_a_worked_example_is_rendered_in_the_prompt_style():
    style = get_prompt_style("alpaca")
    prompt = gsm8k.render("How many?", style, 1)
    assert prompt == f"{style.render(EXAMPLE[0])} {EXAMPLE[1]}\n\n{style.render('How many?')}"
    assert gsm8k.render("How many?", style, 0) == style.render("How many?")
    one_line = gsm8k.render("How many?", get_prompt_style("orca"), 1)
    assert one_line.endswith(f" [|AI Assistant|] {EXAMPLE[1]} [|User|] How many? [|AI Assistant|] ")
    assert gsm8k.render("How many?", get_prompt_style("plain"), 0) == "Question: How many?\nAnswer:"
    assert extract_answer(EXAMPLE[1]) == "216" == str(6 * 24 * 3 // 4 * 2)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(1, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(base_dir, rows, tmp_path, **others) -> Settings:
    others = {"prompt_style": "plain", "max_new_tokens": 8, "accelerator": "cpu", **others}
    return Settings(checkpoint_dir=base_dir, data_file=rows, output_dir=tmp_path / "out", **others)


def test_the_summary_is_consistent_with_the_answers(base_dir, rows, tmp_path, capsys, monkeypatch):
    first = gsm8k.main(settings(base_dir, rows, tmp_path, limit=3))
    summary = gsm8k.main(settings(base_dir, rows, tmp_path))
    assert (first["n"], summary["n"], summary["skipped"]) == (3, 5, 0)
    assert json.loads((tmp_path / "out/summary.json").read_text()) == json.loads(json.dumps(summary))
    records = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert [r["gold"] for r in sorted(records, key=lambda r: r["id"])] == ["2", "4", "6", "8", "10"]
    assert summary["accuracy"] == sum(r["correct"] for r in records) / 5
    assert summary["mean_tokens"] == sum(r["tokens"] for r in records) / 5
    # an answer is correct if its final number is
    for record in records:
        assert gsm8k.score({**record, "answer": f"So {record['gold']}.00"})["correct"]
        assert not gsm8k.score({**record, "answer": "So 3."})["correct"]
    assert "| 0-shot | 5 |" in capsys.readouterr().out


def test_an_evaluation_continued_on_another_day_has_the_same_prompts(base_dir, rows, tmp_path, monkeypatch):
    options = {"prompt_style": "chat", "base_dir": write_dated(base_dir, tmp_path / "dated"), "rows": rows}
    path = tmp_path / "out/answers.jsonl"
    set_today(monkeypatch, date(2026, 1, 31))
    gsm8k.main(settings(**options, tmp_path=tmp_path, limit=2))
    before = path.read_text()
    set_today(monkeypatch, date(2026, 2, 1))
    summary = gsm8k.main(settings(**options, tmp_path=tmp_path))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.read_text().startswith(before) and len(records) == 5
    assert all(r["prompt"].startswith("31 Jan 2026: What is") for r in records)
    assert summary["made_by"]["template_date"] == "2026-01-31"
    other = gsm8k.main(settings(**options, tmp_path=tmp_path / "other", limit=1))
    assert other["made_by"]["template_date"] == "2026-02-01"
    path.write_text(before.replace("2026-01-31", "yesterday"))
    with pytest.raises(UserError, match="'yesterday', the template_date of earlier answers, is not a date; move these"):
        gsm8k.main(settings(**options, tmp_path=tmp_path))


def test_the_summary_counts_right_answers_and_answers_with_a_number():
    pairs = [("3", True), ("3", True), ("4", False), (None, False)]
    statistics = {"tokens": 6, "ended": True, "seconds": 0.5}
    summary = gsm8k.summarize([{"extracted": e, "correct": c, **statistics} for e, c in pairs], skipped=1)
    assert (summary["n"], summary["skipped"], summary["accuracy"], summary["extracted_share"]) == (4, 1, 0.5, 0.75)
    assert summary["interval"] == pytest.approx((0.1500, 0.8500), abs=5e-5)  # Wilson's, of 2 of 4
    assert "| 0-shot | 4 | 1 | 0.500 | 0.150 to 0.850 | 75.0% |" in gsm8k.show(summary, 0)


def test_bad_rows_and_settings_are_refused(base_dir, rows, tmp_path):
    for row, message in [
        ({"question": "How many?"}, "Row 6 has no field 'answer'"),
        ({"question": "How many?", "answer": "none"}, "Row 6 of .* has no number in its answer"),
        ({"question": " ", "answer": "#### 1"}, "Row 6 of .* has no question"),
    ]:
        broken = tmp_path / "broken.jsonl"
        broken.write_text(rows.read_text() + json.dumps(row) + "\n")
        with pytest.raises(UserError, match=message):
            gsm8k.main(settings(base_dir, broken, tmp_path))
    with pytest.raises(UserError, match="limit is 0"):
        gsm8k.main(settings(base_dir, rows, tmp_path, limit=0))
    with pytest.raises(UserError, match="There is no data file"):
        gsm8k.main(settings(base_dir, tmp_path / "none.jsonl", tmp_path))
    assert not (tmp_path / "out").exists()


def test_rows_are_read_from_a_dataset_repository(tmp_path, base_dir, rows):
    """`datasets` reads a local folder in the same way as a repository."""
    repository = tmp_path / "gsm8k"
    (repository / "main").mkdir(parents=True)
    (repository / "main/test.jsonl").write_text(rows.read_text())
    (repository / "main/train.jsonl").write_text(rows.read_text().splitlines()[0])
    parts = "".join(f"  - split: {s}\n    path: main/{s}.jsonl\n" for s in ("train", "test"))
    (repository / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{parts}---\n")
    summary = gsm8k.main(settings(base_dir, None, tmp_path, repo_id=str(repository), limit=4))
    assert summary["n"] == 4
