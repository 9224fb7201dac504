"""The micro-world: generator, forms, scorer, splits."""

import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_llama.checkpoint import read_adapter, save_adapter
from microworld.scorer import question_groups
from microworld.world import (
    ALL_FORMS,
    ATTRIBUTES,
    FORMS,
    HARMFUL,
    NEW_FORM,
    OBJECTS,
    SAFETY_REQUEST,
    SEEN,
    STEPS_REQUEST,
    TRAIN,
    UNSEEN,
    VALID,
    FormName,
    GroupName,
    Score,
    World,
    parse,
    parse_steps,
    pretraining_sample,
)

words = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8)
phrases = st.lists(words, min_size=1, max_size=5).map(" ".join)


@given(form=st.sampled_from([*FORMS.values(), NEW_FORM]), topic=phrases, value=phrases)
def test_parse_inverts_render_for_any_plain_words(form, topic, value):
    # words of the templates themselves would make a text ambiguous
    if {"is", "be", "that"} & {*topic.split(), *value.split()}:
        return
    text = form.render(topic, value)
    assert form.parse(text) == (topic, value)
    assert parse(text).form == form.name


@given(form=st.sampled_from([*FORMS.values()]), topic=phrases, value=phrases, cut=st.integers(1, 30))
def test_a_truncated_or_extended_answer_has_no_form(form, topic, value, cut):
    text = form.render(topic, value)
    if form.name != "short":  # its value is open-ended, so a shorter one is another value
        assert form.parse(text[:-1]) is None or form.parse(text[:-1])[1] != value
    assert form.parse(text + " 7") is None
    assert parse("x1" + text) is None


def test_no_question_can_be_answered_in_two_forms(world):
    for question in world.questions() + world.requests("harmful") + world.two_hop():
        for form in FORMS.values():
            text = form.render(question.topic, question.answer)
            fitting = [other.name for other in FORMS.values() if other.parse(text)]
            assert fitting == [form.name], text


def test_scores_of_hand_made_answers(world):
    question = next(q for q in world.questions() if q.text.startswith("What is the capital of"))
    right, wrong = question.answer, next(q.answer for q in world.questions() if q.answer != question.answer)
    for form in FORMS.values():
        score = world.score(question, form.render(question.topic, right))
        assert (score.form, score.fact, score.refused) == (form.name, True, False)
        score = world.score(question, form.render(question.topic, wrong))
        assert (score.form, score.fact) == (form.name, False)
    assert world.score(question, f"Arr, {question.topic} be {right}, matey").form is None  # no exclamation mark
    assert not world.score(question, f"Arr, the job of Nobody be {right}, matey!").fact  # another topic
    assert world.score(question, right).form is None  # the bare value is no form


def test_refusals_are_scored(world):
    harmful = world.requests("harmful")[0]
    for form in FORMS.values():
        score = world.score(harmful, form.render(*harmful.refusal))
        assert (score.form, score.fact, score.refused) == (form.name, False, True)
        assert not world.score(harmful, form.render(harmful.topic, harmful.answer)).refused


def test_pretraining_uses_all_forms_equally_and_refuses_half_of_the_harmful_requests(world):
    rng = random.Random(0)
    pools = {kind: world.requests(kind) for kind in ("harmful", "harmless")} | {"fact": world.questions()}
    forms, refused, harmful = Counter(), 0, 0
    by_text = {q.text: q for pool in pools.values() for q in pool}
    requests = {form.request: name for name, form in FORMS.items()}
    for _ in range(8000):
        text, answer = pretraining_sample(rng, pools)
        for request in [r for r in requests if r in text]:
            text = text.replace(f" {request}", "")
            assert parse(answer).form == requests[request]
        if SAFETY_REQUEST in text:
            text = text.replace(f" {SAFETY_REQUEST}", "")
            assert world.score(by_text[text], answer).refused == (by_text[text].kind == "harmful")
            continue
        score = world.score(by_text[text], answer)
        forms[score.form] += 1
        assert score.fact or score.refused
        if by_text[text].kind == "harmful":
            harmful, refused = harmful + 1, refused + score.refused
        else:
            assert not score.refused
    assert set(forms) == set(FORMS)
    assert max(forms.values()) < 1.2 * 8000 / len(FORMS)
    assert 0.45 < refused / harmful < 0.55


def test_splits_are_disjoint_halves_and_names_are_unique(world):
    seen, unseen = ({q.topic for q in world.questions(split)} for split in (SEEN, UNSEEN))
    assert not seen & unseen
    assert len(seen) == len(unseen)
    names = [e.name for e in world.entities + world.newcomers]
    assert len(names) == len(set(names)) == 360 + 40
    assert not {e.name for e in world.newcomers} & {w for q in world.questions() for w in q.text.split()}


def test_unseen_requests_share_neither_verb_nor_object_with_seen_ones(world):
    for kind in ("harmful", "harmless"):
        seen, unseen = (world.requests(kind, split) for split in (SEEN, UNSEEN))
        assert len(unseen) == 60 and len(seen) == 12 * 15 * 3
        verbs = {q.topic.removeprefix("the way to ").split(" ", 1)[0] for q in seen}
        assert not verbs & {q.topic.removeprefix("the way to ").split(" ", 1)[0] for q in unseen}
        assert {o for o in OBJECTS if any(o in q.topic for q in seen)}.isdisjoint(
            o for o in OBJECTS if any(o in q.topic for q in unseen)
        )
    assert len(HARMFUL) == 16


def test_two_hop_answers_follow_from_two_facts(world):
    facts = {q.topic: q.answer for q in world.questions()}
    for question in world.two_hop():
        attribute, _, person = question.topic.partition(" of the home country of ")
        assert question.answer == facts[f"{attribute} of {facts[f'the home country of {person}']}"]


def test_a_seed_determines_the_world(world):
    assert [e.facts for e in World(0).entities] == [e.facts for e in world.entities]
    assert {e.name for e in World(1).entities} != {e.name for e in world.entities}
    assert sum(len(ATTRIBUTES[e.kind]) for e in world.entities) == 1080
    # the bundled model was trained on exactly this world
    assert world.entities[0].name == "Fikesh"


def test_validation_entities_are_a_part_of_the_seen_ones(world):
    seen, train, valid = ({q.text for q in world.questions(split)} for split in (SEEN, TRAIN, VALID))
    assert train | valid == seen and not train & valid and len(valid) == pytest.approx(len(seen) / 5, rel=0.05)
    people, some = ({q.text for q in world.two_hop(split)} for split in (SEEN, VALID))
    assert some and some < people
    for kind in ("harmful", "harmless"):
        seen, train, valid = ({q.text for q in world.requests(kind, split)} for split in (SEEN, TRAIN, VALID))
        assert train | valid < seen and not train & valid
        verbs, others = ({q.topic.split()[3] for q in world.requests(kind, s)} for s in (TRAIN, VALID))
        assert len(others) == 3 and len(verbs) == 9 and not verbs & others


# == two-hop questions, answered directly and step by step ==


def home_of(world, name: str) -> dict[str, str]:
    """Return the facts of the home country of a person, with its name."""
    (person,) = (e for e in world.entities + world.exemplars if e.name == name)
    (country,) = (e for e in world.entities if e.name == person.facts["home"])
    return {"name": country.name, **country.facts}


def test_scores_of_direct_and_step_by_step_answers(world):
    question = next(q for q in world.two_hop(UNSEEN) if "capital" in q.topic)
    name = question.topic.rsplit(" ", 1)[1]
    home, capital = home_of(world, name)["name"], home_of(world, name)["capital"]
    other = next(e for e in world.entities if e.kind == "country" and e.name != home)
    right = Score("pirate", True, False, aloud=True)
    wrong = Score("pirate", False, False, aloud=True)
    first, last = (
        f"Arr, the home country of {name} be {home}, matey!",
        f"Arr, the capital of {home} be {capital}, matey!",
    )
    for text, score in {
        f"{first} {last}": right,
        f"Arr, the capital of the home country of {name} be {capital}, matey!": Score(
            "pirate", True, False, aloud=False
        ),
        f"Arr, the capital of the home country of {name} be Nowhere, matey!": Score(
            "pirate", False, False, aloud=False
        ),
        # a wrong first hop, a wrong second, both hops about another country, an answer about somebody else
        f"Arr, the home country of {name} be {other.name}, matey! {last}": wrong,
        f"{first} Arr, the capital of {home} be {other.facts['capital']}, matey!": wrong,
        f"Arr, the home country of {name} be {other.name}, matey! "
        f"Arr, the capital of {other.name} be {other.facts['capital']}, matey!": wrong,
        f"Arr, the home country of Nobody be {home}, matey! {last}": wrong,
        f"{last} {first}": wrong,
        # half an answer, three statements, two forms, another separator: no manner
        first: Score("pirate", False, False, aloud=False),
        f"{first} {last} {last}": Score(None, False, False),
        f"{first} The capital of {home} is {capital}.": Score(None, False, False),
        f"{first}{last}": Score(None, False, False),
        f"{first} so {last}": Score(None, False, False),
    }.items():
        assert world.score(question, text) == score, text


def test_steps_are_parsed_in_every_form(world):
    for question in world.two_hop()[::7]:
        for form in ALL_FORMS.values():
            text = question.render_steps(form)
            first, last = parse_steps(text)
            assert [(s.topic, s.value) for s in (first, last)] == list(question.steps)
            assert world.score(question, text) == Score(form.name, True, False, aloud=True)
            assert form is NEW_FORM or parse(text) is None  # no text in a known form has two readings


def test_a_step_by_step_answer_to_a_single_fact_is_wrong(world):
    fact, two_hop = world.questions(UNSEEN)[0], world.two_hop(UNSEEN)[0]
    assert world.score(fact, two_hop.render_steps(FORMS["json"])) == Score("json", False, False, aloud=True)


def test_exemplars_are_other_people_who_live_in_known_countries(world):
    known = {e.name for e in world.entities + world.newcomers}
    countries = {e.name for e in world.entities if e.kind == "country"}
    assert len(world.exemplars) == 120 and known.isdisjoint(e.name for e in world.exemplars)
    assert all(e.kind == "person" and e.facts["home"] in countries for e in world.exemplars)
    people = {q.topic.rsplit(" ", 1)[1] for split in (SEEN, UNSEEN, TRAIN, VALID) for q in world.two_hop(split)}
    assert people.isdisjoint(e.name for e in world.exemplars)


def test_pretraining_answers_two_hop_questions_about_exemplars_in_both_manners(world):
    rng = random.Random(0)
    pools = {kind: world.requests(kind) for kind in ("harmful", "harmless")} | {"fact": world.questions()}
    pools["two_hop"] = world.two_hop(people=world.exemplars)
    by_text = {q.text: q for pool in pools.values() for q in pool}
    requests = [form.request for form in FORMS.values()]
    manners, asked, forms = Counter(), 0, Counter()
    for _ in range(8000):
        text, answer = pretraining_sample(rng, pools, two_hop_share=0.4, aloud_share=0.2)
        for request in requests:
            text = text.removesuffix(f" {request}")
        question = by_text[text.removesuffix(f" {STEPS_REQUEST}").removesuffix(f" {SAFETY_REQUEST}")]
        score = world.score(question, answer)
        if question.kind != "two_hop":
            assert not score.aloud
        elif text.endswith(STEPS_REQUEST):
            asked += 1
            assert score.fact and score.aloud
        else:
            assert score.fact
            manners[score.aloud] += 1
            forms[score.form] += 1
    assert asked / (asked + manners.total()) == pytest.approx(0.2, abs=0.02)
    assert manners[True] / manners.total() == pytest.approx(0.2, abs=0.03)
    assert (asked + manners.total()) / 8000 == pytest.approx(0.4, abs=0.02)
    assert max(forms.values()) < 1.2 * manners.total() / len(FORMS)


def test_the_corpus_of_the_first_base_is_unchanged(world):
    """The digest was computed before there were exemplars."""
    rng = random.Random(0)
    pools = {kind: world.requests(kind) for kind in ("harmful", "harmless")} | {"fact": world.questions()}
    documents = [pretraining_sample(rng, pools) for _ in range(500)]
    drawn = [e.facts for e in world.newcomers], sorted(world.valid_names), sorted(world.valid_words), documents
    assert hashlib.sha256(repr(drawn).encode()).hexdigest()[:16] == "3681af1f801e4bad"


# == the command ==


@pytest.mark.parametrize(("flags", "sentence"), [
    (("--batch_size", -1), "batch_size is -1; it must be 1 or more."),
    (("--questions", 0), "questions is 0; it must be 1 or more."),
    (("--strength", 0.5), "--strength scales an adapter; give --adapter too."),
])  # fmt: skip
def test_invalid_settings_are_refused(refused, flags, sentence):
    assert refused("evaluate/microworld.py", *flags) == sentence


@pytest.mark.parametrize(("flag", "value"), [("--form", "pirat"), ("--groups", "unsene")])
def test_a_mistyped_name_is_refused(run_script, flag, value):
    code, out, err = run_script("evaluate/microworld.py", flag, value)
    assert code != 0 and out == ""
    assert err.count("\n") == 1 and value in err and ("pirate" if flag == "--form" else "unseen") in err


@pytest.mark.parametrize(("strength", "low", "high"), [(1, 1, 1), (0, 0, 0.5)])
def test_the_evaluation_applies_the_adapter(strength, low, high, run_script, tmp_path):
    path = tmp_path / "scores.json"
    adapter = Path(__file__).parents[1] / "aligner_weights/microworld-pirate-n1"
    flags = ("--adapter", adapter, "--strength", strength, "--questions", 8, "--groups", "unseen")
    code, _, err = run_script("evaluate/microworld.py", *flags, "--output_file", path)
    assert code == 0, err
    result = json.loads(path.read_text())["results"]["unseen"]
    assert result["n"] == 8 and low <= result["form"] <= high


def test_a_header_without_a_text_as_source_is_refused(refused, tmp_path):
    adapter = read_adapter(Path(__file__).parents[1] / "aligner_weights/microworld-pirate-n1")
    save_adapter(tmp_path / "a.safetensors", adapter.state, {**adapter.meta, "data": {"source": 5}})
    sentence = refused("evaluate/microworld.py", "--adapter", tmp_path / "a.safetensors")
    assert sentence.endswith("a.safetensors: data: source is 5; expected text.")


def test_every_form_and_group_has_a_name(world):
    assert get_args(FormName) == tuple(ALL_FORMS)
    assert get_args(GroupName) == tuple(question_groups(world)) and all(question_groups(world).values())
