import studies.train_microworld_values as script


def test_the_base_knows_the_facts_and_prefers_no_value():
    """Scores of the bundled model: every answer has a form, facts are right, harmless requests are not refused."""
    found = script.score(script.Settings(questions=12, repeats=2), [])
    assert found["formed"] == 1
    assert found["fact"] >= 0.9
    assert found["false"] == 0
    assert 0.1 < found["refused"] < 0.9
    assert found["form"] < 0.5


def test_tables():
    rows = {"base": {"refused": 0.5, "fact": 1.0, "form": 0.1}}
    assert script.table("adapter", rows, {"refused": "refuses", "fact": "facts right"}) == (
        "| adapter | refuses | facts right |\n| --- | ---: | ---: |\n| base | 50.0% | 100.0% |"
    )
