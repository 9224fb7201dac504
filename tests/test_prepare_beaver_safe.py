import json
from pathlib import Path

import pytest

import scripts.prepare_beaver_safe as script
from lit_llama import cli
from lit_llama.data import PreferenceData, SFTData, read_meta
from lit_llama.utils import UserError


def pku(prompt: str, first: str, second: str, safe: tuple[bool, bool], better: int, safer: int) -> dict:
    """Return a row in the format of PKU-SafeRLHF, with one of its newer columns."""
    return {"prompt": prompt, "response_0": first, "response_1": second, "is_response_0_safe": safe[0],
            "is_response_1_safe": safe[1], "better_response_id": better, "safer_response_id": safer,
            "prompt_source": "Alpaca3-70B"}  # fmt: skip


ROWS = [
    pku("the cat", "no", "yes", (True, False), 1, 0),
    pku("the dog", "go", "stay", (True, True), 0, 1),
    pku("the rat", "bad", "worse", (False, False), 0, 0),
    pku("the hat", "hot", "cold", (False, True), 1, 1),
]


@pytest.fixture
def prepare(tmp_path, base_dir):
    """Return a function that runs the script on rows and returns the output folder."""

    def run(rows: list, **flags) -> Path:
        file, folder = tmp_path / "rows.jsonl", tmp_path / "out"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        flags = {"data_file": file, "output_dir": folder, "checkpoint_dir": base_dir, "num_proc": 1, **flags}
        words = [f"--{name}={value}" for name, value in flags.items()]
        script.main(cli.parse(script.Settings, words))
        return folder

    return run


def pairs_in(folder: Path, tokenizer) -> set[tuple[str, ...]]:
    rows = [row for split in ("train", "test") for row in PreferenceData(folder, split, tokenizer).rows]
    return {tuple(tokenizer.decode(row[k].tolist()) for k in ("prompt", "chosen", "rejected")) for row in rows}


CAT, DOG, RAT, HAT = (f"[User] the {thing} [Assistant] " for thing in ("cat", "dog", "rat", "hat"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {(CAT, "no", "yes"), (DOG, "stay", "go"), (HAT, "cold", "hot")}),
        ({"prefer": "better"}, {(CAT, "yes", "no"), (DOG, "go", "stay"), (HAT, "cold", "hot")}),
        ({"keep": "one_safe"}, {(CAT, "no", "yes"), (HAT, "cold", "hot")}),
        ({"keep": "all"}, {(CAT, "no", "yes"), (DOG, "stay", "go"), (RAT, "bad", "worse"), (HAT, "cold", "hot")}),
    ],
)
def test_pku_rows_are_chosen_by_keep_and_prefer(prepare, tokenizer, flags, expected):
    assert pairs_in(prepare(ROWS, **flags), tokenizer) == expected


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"revision": "v0"}, "--revision and --data_file cannot be combined."),
        ({"split": "train"}, "--split and --data_file cannot be combined."),
        ({"data_format": "hh", "keep": "any_safe"}, "--keep and --prefer need --data_format pku."),
        ({"data_format": "preference", "prefer": "better"}, "--keep and --prefer need --data_format pku."),
    ],
)
def test_flags_without_effect_are_refused(prepare, refusal, flags, sentence):
    assert refusal(lambda: prepare(ROWS, **flags)) == sentence


def test_omitted_rows_are_reported_and_recorded(prepare, capsys):
    undecided = pku("a", "b", "c", (True, True), 0, -1)
    folder = prepare([*ROWS, undecided])
    output = capsys.readouterr()
    sentence = "Omitted 1 rows excluded by --keep any_safe. Omitted 1 rows without a safer response. Kept 3 rows."
    assert sentence in output.err
    assert output.out == f"{folder}\n"
    meta = read_meta(folder, PreferenceData.format)
    assert meta["left_out"] == {"excluded by --keep any_safe": 1, "without a safer response": 1}
    assert (meta["prompt_style"], meta["keep"], meta["prefer"]) == ("beaver", "any_safe", "safer")


def test_the_sft_stage_writes_the_preferred_responses(prepare, tokenizer):
    folder = prepare(ROWS, stage="sft")
    samples = [pair for split in ("train", "test") for pair in SFTData(folder, split, tokenizer).prompts(9)]
    texts = {tuple(map(tokenizer.decode, pair)) for pair in samples}
    assert texts == {(CAT, "no"), (DOG, "stay"), (HAT, "cold")}
    assert all(response[-1] == tokenizer.eos_id for _, response in samples)


def test_a_truncated_response_has_no_eos_in_either_stage(prepare, tokenizer):
    rows = [*ROWS, pku("the fat", "a b c d e f g h", "a b", (True, False), 0, 0)]
    for stage, data_class in (("sft", SFTData), ("dpo", PreferenceData)):
        folder = prepare(rows, stage=stage, max_seq_length=len(tokenizer.encode(CAT, bos=True)) + 3)
        assert read_meta(folder, data_class.format)["counts"]["cut"] >= 1
        responses = [
            response for split in ("train", "test") for _, response in data_class(folder, split, tokenizer).prompts(9)
        ]
        complete = {tuple(tokenizer.encode(text, eos=True)) for text in ("no", "stay", "cold", "a b c d e f g h")}
        assert all((tokenizer.eos_id in ids) == (tuple(ids) in complete) for ids in responses)
        assert any(tokenizer.eos_id not in ids for ids in responses)


def test_pairs_of_one_prompt_stay_in_one_split(prepare, tokenizer):
    rows = [pku(f"the {i % 10}", f"good {i}", f"bad {i}", (True, False), 0, 0) for i in range(40)]
    for stage, data_class in (("sft", SFTData), ("dpo", PreferenceData)):
        folder = prepare(rows, stage=stage, test_fraction=0.25)
        train, test = ({tuple(p) for p, _ in data_class(folder, s, tokenizer).prompts(40)} for s in ("train", "test"))
        assert len(train) + len(test) == 10 and not train & test
        counts = read_meta(folder, data_class.format)["counts"]
        assert (counts["prompts"], counts["train"], counts["test"]) == (10, 28, 12)


def test_prompts_held_out_in_one_stage_are_not_trained_on_in_the_other(prepare, tokenizer):
    """The stages keep different rows: DPO drops pairs with equal responses and, here, pairs with two safe ones."""
    rows = [pku(f"cat {i}", "no", "no" if i % 3 else "yes", (True, i % 5 == 0), 0, 0) for i in range(90)]
    prompts = {}
    for stage, keep, data_class in (("sft", "any_safe", SFTData), ("dpo", "one_safe", PreferenceData)):
        folder = prepare(rows, stage=stage, test_fraction=0.3, keep=keep)
        for split in ("train", "test"):
            prompts[stage, split] = {tuple(p) for p, _ in data_class(folder, split, tokenizer).prompts(90)}
    assert len(prompts["dpo", "test"]) > 3 and not prompts["dpo", "test"] & prompts["sft", "train"]
    assert len(prompts["sft", "test"]) > 9 and not prompts["sft", "test"] & prompts["dpo", "train"]


def test_a_single_prompt_cannot_be_split(prepare):
    with pytest.raises(UserError, match="All 4 rows have the same prompt"):
        prepare([pku("the cat", "good", f"bad {i}", (True, False), 0, 0) for i in range(4)])


def test_plain_preference_files(prepare, tokenizer):
    rows = [
        {"prompt": "the cat", "chosen": "a", "rejected": "b"},
        {"instruction": "the dog", "input": "ate", "chosen": "c", "rejected": "d"},
    ]
    pairs = pairs_in(prepare(rows, data_format="preference", prompt_style="orca"), tokenizer)
    assert pairs == {
        ("[|User|] the cat [|AI Assistant|] ", "a", "b"),
        ("[|User|] the dog\nate [|AI Assistant|] ", "c", "d"),
    }


def hh(chosen: str, rejected: str) -> dict[str, str]:
    return {"chosen": chosen, "rejected": rejected}


TALK = "\n\nHuman: the cat\n\nAssistant: sat"
LONGER = "\n\nHuman: the rat\n\nAssistant: sat\n\nHuman: and the dog\n\nAssistant:"


def test_dialogues_share_their_turns_and_differ_in_the_last_answer(prepare, tokenizer, capsys):
    rows = [
        hh(TALK, "\n\nHuman: the cat\n\nAssistant: ate"),
        hh(f"{LONGER} a", f"{LONGER} b"),
        hh(TALK, "\n\nHuman: the dog\n\nAssistant: sat"),
        hh(TALK, "\n\nHuman: the cat"),
        hh(TALK, "\n\nHuman: the cat\n\nAssistant: "),
    ]
    pairs = pairs_in(prepare(rows, data_format="hh"), tokenizer)
    two_turns = "[User] the rat [Assistant] sat [User] and the dog [Assistant] "
    assert pairs == {(CAT, "sat", "ate"), (two_turns, "a", "b")}
    stderr = capsys.readouterr().err
    assert "Omitted 1 rows with dialogues that differ before the last answer." in stderr
    assert "Omitted 1 rows that do not end with an answer. Kept 3 rows." in stderr
    assert "3 rows. Dropped: 1 with an empty text" in stderr


@pytest.mark.parametrize(
    ("data_format", "row", "sentence"),
    [
        ("pku", {"prompt": "a"}, "Row 3 has no field 'response_0'; it has 'prompt'."),
        ("pku", ROWS[0] | {"prompt": None}, "Row 3: 'prompt' is not text but null."),
        ("pku", ROWS[0] | {"is_response_1_safe": "no"}, "Row 3: 'is_response_1_safe' is 'no'; it must be true or"),
        ("pku", ROWS[0] | {"safer_response_id": 2}, "Row 3: 'safer_response_id' is 2; it must be 0 or 1"),
        ("pku", {k: v for k, v in ROWS[0].items() if k != "safer_response_id"}, "Row 3 has no field 'safer_res"),
        ("hh", hh("hello", "there"), "Row 3: 'chosen' is not a dialogue of 'Human:' and 'Assistant:' turns."),
        ("hh", {"chosen": TALK}, "Row 3 has no field 'rejected'; it has 'chosen'."),
        ("preference", ["a"], "Row 3 is not an object with named fields but list."),
    ],
)
def test_an_invalid_row_is_reported_and_nothing_is_written(prepare, tmp_path, data_format, row, sentence):
    good = {"pku": ROWS[0], "hh": hh(TALK, TALK + "!"), "preference": {"prompt": "a", "chosen": "b", "rejected": "c"}}
    with pytest.raises(UserError) as error:
        prepare([good[data_format]] * 2 + [row], data_format=data_format)
    assert str(error.value).startswith(f"{tmp_path / 'rows.jsonl'}: {sentence}")
    assert not (tmp_path / "out").exists()


def test_real_dialogues(shared, prepare, tokenizer, capsys):
    file = shared / "data/hh_rlhf_harmless_base_test.jsonl.gz"
    folder = prepare([], data_format="hh", data_file=file, checkpoint_dir=shared / "models/llama2-tokenizer",
                     prompt_style="hh")  # fmt: skip
    meta = read_meta(folder, PreferenceData.format)
    # counted with str.rsplit at the last "Assistant:": five pairs differ before it, four answers are empty
    assert meta["left_out"] == {"with dialogues that differ before the last answer": 5}
    rows = [row for split in ("train", "test") for row in PreferenceData(folder, split).rows]
    cut = [row for row in rows for side in ("chosen", "rejected") if row[side][-1] != 2]
    assert all(1024 in (len(r["prompt"]) + len(r["chosen"]), len(r["prompt"]) + len(r["rejected"])) for r in cut)
    counts = {k: meta["counts"][k] for k in ("rows", "empty", "too_long", "identical", "cut")}
    assert counts == {"rows": 2307, "empty": 4, "too_long": 0, "identical": 0, "cut": len(cut)}
    assert len(rows) == 2303
