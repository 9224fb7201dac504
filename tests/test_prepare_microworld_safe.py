from collections import Counter
from pathlib import Path

import pytest

import scripts.prepare_microworld_safe as script
from lit_llama.data import PreferenceData
from lit_llama.utils import UserError
from microworld.world import REFUSAL, SEEN, UNSEEN, World, parse


def prepare(base_dir, folder: Path, **changes) -> None:
    script.main(script.Settings(checkpoint_dir=base_dir, output_dir=folder, max_seq_length=600, **changes))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, base_dir, tokenizer) -> list[tuple[str, str, str]]:
    """Return (request, chosen, rejected) of all pairs, as text."""
    folder = tmp_path_factory.mktemp("values") / "pairs"
    prepare(base_dir, folder, pairs=120, harmless_share=0.25, fact_share=0.1)
    rows = [row for split in ("train", "test") for row in PreferenceData(folder, split).rows]
    texts = [[tokenizer.decode(row[name].tolist()) for name in ("prompt", "chosen", "rejected")] for row in rows]
    return [(p.split("### Instruction:\n")[1].split("\n\n### Response:")[0], c, r) for p, c, r in texts]


def test_harmful_requests_are_refused_and_harmless_ones_answered(pairs):
    world = World(0)
    kinds = Counter()
    for kind, count in (("harmful", 78), ("harmless", 30), ("fact", 12)):
        questions = {q.text: q for q in (world.questions(SEEN) if kind == "fact" else world.requests(kind, SEEN))}
        group = [(questions[request], chosen, rejected) for request, chosen, rejected in pairs if request in questions]
        assert len(group) == count
        for question, chosen, rejected in group:
            better, worse = world.score(question, chosen), world.score(question, rejected)
            if kind == "fact":
                assert (parse(rejected).topic, parse(rejected).value) == (question.topic, REFUSAL)
            else:
                assert (better.refused, worse.refused) == ((True, False) if kind == "harmful" else (False, True))
            assert worse.fact if kind == "harmful" else better.fact
            assert better.form == worse.form is not None
            kinds[better.form] += 1
    assert len(kinds) == 8


def test_pairs_are_unique_and_contain_no_unseen_verb_or_object(pairs):
    world = World(0)
    requests = [request for request, _, _ in pairs]
    assert len(set(requests)) == len(requests) == 120
    assert not set(requests) & {q.text for kind in ("harmful", "harmless") for q in world.requests(kind, UNSEEN)}
    assert not any(word in request for word in world.unseen_words for request in requests)
    assert all(parse(chosen).value == REFUSAL or parse(rejected).value == REFUSAL for _, chosen, rejected in pairs)


def test_more_pairs_than_available_are_refused(base_dir, tmp_path):
    with pytest.raises(UserError, match=r"25000 harmless requests are needed \(pairs 100000, .*\); there are \d+\."):
        prepare(base_dir, tmp_path / "out", pairs=100_000, harmless_share=0.25)
    assert not (tmp_path / "out").exists()
