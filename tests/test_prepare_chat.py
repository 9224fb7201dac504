"""scripts/prepare_chat.py, and preference data with message lists: row formats, masks, truncation, training."""

import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from chat_models import write_model

from lit_llama.checkpoint import read_adapter, save_adapter, save_base
from lit_llama.conversations import read_conversation
from lit_llama.data import PreferenceData, SFTData, check_tokenizer, hash_chat_tokens, read_meta
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError

ROOT = Path(__file__).parents[1]
MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Is the cat <|im_end|> <|eot_id|> here?"},
        {"role": "assistant", "content": " The cat sat. "},
        {"role": "user", "content": [{"type": "text", "text": "And the "}, {"type": "text", "text": "dog?"}]},
        {"role": "assistant", "content": "The dog ate."},
    ]
}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Where is the hat?"},
        {"from": "gpt", "value": "On the mat."},
        {"from": "human", "value": "And the cat?"},
        {"from": "gpt", "value": "There too."},
        {"from": "human", "value": "Thanks!"},
    ],
    "system": "Be short.",
}
SINGLE = {"messages": [{"role": "user", "content": "the rat"}, {"role": "assistant", "content": "ran"}]}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer_path) -> dict[str, Path]:
    """Return the folders of instruct models with random weights, by kind."""
    folders = {}
    for kind in ("llama3", "chatml", "thinking", "mistral"):
        folder = write_model(tmp_path_factory.mktemp("models") / kind, kind, tokenizer_path)
        size = Tokenizer(folder).vocab_size
        config = LLaMAConfig(block_size=192, vocab_size=size, n_layer=3, n_head=2, n_embd=16, intermediate_size=24)
        network = LLaMA(config)
        generator = torch.Generator().manual_seed(0)
        state = {name: 0.3 * torch.randn(p.shape, generator=generator) for name, p in network.named_parameters()}
        save_base(folder, config, state)
        folders[kind] = folder
    return folders


@pytest.fixture
def prepare(run_script, tmp_path):
    """Return a function that runs a preparation script on rows and returns the output folder and stderr."""

    def run(rows: list, model: Path, *flags: object, script: str = "prepare_chat") -> tuple[Path, str]:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        code, out, err = run_script(
            f"scripts/{script}.py", "--data_file", tmp_path / "rows.jsonl", "--checkpoint_dir", model,
            "--output_dir", tmp_path / "out", "--test_fraction", 0.3, "--num_proc", 1, *flags,
        )  # fmt: skip
        assert code == 0 and out == f"{tmp_path / 'out'}\n", err
        return tmp_path / "out", err

    return run


def label_texts(folder: Path, tokenizer: Tokenizer) -> set[tuple[str, ...]]:
    """Return the texts of each row's contiguous runs of label tokens, including special tokens."""
    names = {i: text for text, i in tokenizer.chat_engine.control.items()}
    texts = set()
    for split in ("train", "test"):
        data = SFTData(folder, split, tokenizer)
        batch = data.batch(np.arange(len(data)))
        for idx, labels, weight, length in zip(batch["idx"], batch["labels"], data.weights, data.lengths, strict=True):
            assert ((labels == idx) | (labels == -1)).all() and (labels[length:] == -1).all()
            assert weight == (labels != -1).sum()
            runs: list[list[int]] = []
            for previous, label in zip([-1, *labels.tolist()], labels.tolist(), strict=False):
                if label != -1:
                    if previous == -1:
                        runs.append([])
                    runs[-1].append(label)
            texts.add(tuple("".join(names.get(i) or tokenizer.decode([i]) for i in run) for run in runs))
    return texts


def test_both_kinds_of_rows_train_on_all_answers(prepare, models):
    folder, err = prepare([MESSAGES, SHAREGPT, SINGLE], models["chatml"])
    tokenizer = Tokenizer(models["chatml"])
    assert label_texts(folder, tokenizer) == {
        ("The cat sat.<|im_end|>", "The dog ate.<|im_end|>"),
        ("On the mat.<|im_end|>", "There too.<|im_end|>"),
        ("ran<|im_end|>",),
    }
    meta = read_meta(folder, SFTData.format)
    assert (meta["prompt_style"], meta["train_on"], meta["multi_turn"], meta["mask_prompt"]) == (
        "chat", "all", True, True,
    )  # fmt: skip
    assert meta["chat_template_sha256"] == tokenizer.template.sha256
    assert meta["chat_tokens_sha256"] == hash_chat_tokens(tokenizer)
    rows = [row for split in ("train", "test") for row in SFTData(folder, split, tokenizer).rows]
    texts = [tokenizer.decode(row["input_ids"].tolist()) for row in rows]
    # these are encoded as ordinary text: decoding would omit special tokens
    assert any("Is the cat <|im_end|> <|eot_id|> here?" in text for text in texts)
    assert any("system\nBe short." in text for text in texts) and "Rendering" in err


def test_ids_are_those_of_the_complete_conversation(prepare, models):
    transformers = pytest.importorskip("transformers")
    rows = [{"messages": [*SINGLE["messages"], {"role": "user", "content": f"why {i}"},
                          {"role": "assistant", "content": "so\n\n  it is"}]} for i in range(4)]  # fmt: skip
    rows = [{"messages": [{"role": "user", "content": f"cat {i}"}, *row["messages"][1:]]} for i, row in enumerate(rows)]
    for kind in ("llama3", "chatml", "mistral"):
        folder, _ = prepare(rows, models[kind], "--seed", 1)
        reference = transformers.AutoTokenizer.from_pretrained(models[kind])
        tokenizer = Tokenizer(models[kind])
        data = [SFTData(folder, split, tokenizer) for split in ("train", "test")]
        prepared = {tuple(row["input_ids"].tolist()) for split in data for row in split.rows}
        expected = set()
        for row in rows:
            encoded = reference.apply_chat_template(
                row["messages"], return_dict=True, return_assistant_tokens_mask=True
            )
            last = max(i for i, is_generated in enumerate(encoded["assistant_masks"]) if is_generated)
            expected.add(tuple(encoded["input_ids"][: last + 1]))
        assert prepared == expected


def test_train_on_last_labels_only_the_last_answer(prepare, models):
    folder, _ = prepare([MESSAGES, SHAREGPT, SINGLE], models["llama3"], "--train_on", "last")
    tokenizer = Tokenizer(models["llama3"])
    assert label_texts(folder, tokenizer) == {
        ("The dog ate.<|eot_id|>",), ("There too.<|eot_id|>",), ("ran<|eot_id|>",)
    }  # fmt: skip


def test_a_template_that_changes_earlier_turns_gives_a_row_for_each_answer(prepare, models):
    folder, err = prepare([MESSAGES, SHAREGPT, SINGLE], models["thinking"])
    assert "3 conversations" not in err and "2 conversations became 4 rows, one for each answer" in err
    assert label_texts(folder, Tokenizer(models["thinking"])) == {
        (f"<think>\n\n</think>\n\n{text}<|im_end|>",)
        for text in ("The cat sat.", "The dog ate.", "On the mat.", "There too.", "ran")
    }
    _, err = prepare([MESSAGES, SHAREGPT, SINGLE], models["thinking"], "--train_on", "last")
    assert "became" not in err


def test_other_styles_give_a_row_for_each_answer(prepare, models):
    folder, _ = prepare([MESSAGES, SHAREGPT, SINGLE], models["chatml"], "--prompt_style", "beaver")
    tokenizer = Tokenizer(models["chatml"])
    pairs = [pair for split in ("train", "test") for pair in SFTData(folder, split, tokenizer).prompts(9)]
    texts = {tuple(map(tokenizer.decode, pair)) for pair in pairs}
    question = "[User] Be kind.\n\nIs the cat <|im_end|> <|eot_id|> here? [Assistant] "
    assert (question, "The cat sat.") in texts and len(texts) == 5
    assert (f"{question}The cat sat. [User] And the dog? [Assistant] ", "The dog ate.") in texts


def test_parts_of_a_conversation_stay_in_one_split(prepare, models):
    rows = []
    for i in range(12):
        turn = [{"role": "user", "content": f"cat {i}"}, {"role": "assistant", "content": f"sat {i}"}]
        rows.append({"messages": turn * 3})
    for kind, style in (("thinking", "chat"), ("chatml", "orca")):
        folder, _ = prepare(rows, models[kind], "--prompt_style", style)
        tokenizer = Tokenizer(models[kind])
        train, test = ({tokenizer.decode(r["input_ids"].tolist()).split("cat ")[1].split()[0].split("<")[0]
                        for r in SFTData(folder, split, tokenizer).rows} for split in ("train", "test"))  # fmt: skip
        assert train and test and not train & test
        assert len(train | test) == 12


def test_truncated_conversations_end_after_an_answer(prepare, models):
    tokenizer = Tokenizer(models["chatml"])
    text, spans = tokenizer.template.answer_spans(MESSAGES_READ)
    first, both = (len(tokenizer.encode(text.part(0, end))) for _, end in spans)
    prompt = len(tokenizer.encode(text.part(0, spans[0][0])))
    rows = [MESSAGES, SHAREGPT, SINGLE]
    for limit, expected in (
        (both, ("The cat sat.<|im_end|>", "The dog ate.<|im_end|>")),
        (both - 1, ("The cat sat.<|im_end|>",)),
        (first, ("The cat sat.<|im_end|>",)),
    ):
        folder, err = prepare(rows, models["chatml"], "--max_seq_length", limit)
        assert expected in label_texts(folder, tokenizer)
        n_cut = read_meta(folder, SFTData.format)["counts"]["cut"]
        assert f". {n_cut} conversations shortened to {limit} tokens." in err and (n_cut > 0) == (limit < both)
    folder, err = prepare(rows, models["chatml"], "--max_seq_length", prompt + 3)
    cut = next(runs for runs in label_texts(folder, tokenizer) if runs[0].startswith("T"))
    assert cut[0].endswith("<|im_end|>") and len(cut) == 1 and cut[0] != "The cat sat.<|im_end|>"
    folder, err = prepare(rows, models["chatml"], "--max_seq_length", prompt + 1)
    assert "1 with too long a prompt" in err


def test_fields_of_other_rows_are_not_part_of_tools_and_calls():
    """Arrow gives all tools the same fields; those that a tool does not have are null."""
    rows = []
    for name, parameters in (("weather", {"unit": {"type": "string"}}), ("add", {"a": {"type": "number"}})):
        call = {"type": "function", "function": {"name": name, "arguments": dict.fromkeys(parameters, "x")}}
        messages = [{"role": "user", "content": "the rat"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        tool = {"type": "function", "function": {"name": name, "parameters": {"properties": parameters}}}
        rows.append({"messages": messages, "tools": [tool]})
    for given, row in zip(rows, datasets.Dataset.from_list(rows), strict=True):
        assert read_conversation(row, 1) == (given["messages"], given["tools"])
    text = '[{"name": "add", "default": null}]'
    assert read_conversation({**SINGLE, "tools": text}, 1)[1] == json.loads(text)


MESSAGES_READ = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Is the cat <|im_end|> <|eot_id|> here?"},
    {"role": "assistant", "content": "The cat sat."},
    {"role": "user", "content": "And the dog?"},
    {"role": "assistant", "content": "The dog ate."},
]


def test_unusable_rows_are_counted(prepare, models):
    only_question = {"messages": [{"role": "user", "content": "a"}]}
    answer_first = {"messages": [{"role": "assistant", "content": "Hi!"}, *SINGLE["messages"]]}
    empty = {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "b"}]}
    twice = {"messages": [SINGLE["messages"][0], *SINGLE["messages"]]}
    no_calls = {"messages": [CAT, {"role": "assistant", "content": "", "tool_calls": []}]}
    rows = [only_question, answer_first, empty, twice, SINGLE, SHAREGPT, {"conversations": []}, no_calls]
    folder, err = prepare(rows, models["mistral"])
    assert "Omitted 2 rows without an answer to a question (the first: row 1)." in err
    assert "Omitted 2 rows with an empty message (the first: row 3)." in err
    assert "Omitted 1 rows that the chat template refuses (the first: row 4: The chat template refuses" in err
    assert "Conversation roles must alternate" in err
    assert read_meta(folder, SFTData.format)["left_out"]["rows with an empty message"] == 2


@pytest.mark.parametrize("content", ["", " \n", None])
def test_a_system_message_without_text_is_omitted(content, prepare, models):
    def rows() -> list[list[int]]:
        data = [SFTData(folder, split, Tokenizer(models["chatml"])) for split in ("train", "test")]
        return sorted(row["input_ids"].tolist() for split in data for row in split.rows)

    folder, _ = prepare([SINGLE, {"messages": [CAT, ATE]}], models["chatml"])
    expected = rows()
    system = {"role": "system", "content": content}
    prepare([{"messages": [system, *SINGLE["messages"]]}, {"messages": [system, CAT, ATE]}], models["chatml"])
    assert rows() == expected


def test_answers_to_no_question_are_omitted_in_other_styles(prepare, models):
    twice = {"messages": [*SINGLE["messages"], {"role": "system", "content": "a"}, message("assistant", "sat")]}
    folder, err = prepare([twice, {"messages": [CAT, ATE]}], models["chatml"], "--prompt_style", "plain")
    assert "Omitted 1 answers that follow no question (the first: row 1)." in err
    assert read_meta(folder, SFTData.format)["counts"]["rows"] == 2


WRONG = {
    "Row 2 has no field 'messages' or 'conversations'; it has 'prompt'.": {"prompt": "a"},
    "Row 2: 'messages' is not a list of messages.": {"messages": "a"},
    "Row 2: 'messages', message 1: 'role' is \"robot\"; it must be one of system, user": {
        "messages": [{"role": "robot", "content": "a"}]
    },
    "Row 2: 'conversations', message 1: 'from' is 3; it must be": {"conversations": [{"from": 3, "value": "a"}]},
    "Row 2: 'messages', message 2 has no text.": {"messages": [SINGLE["messages"][0], {"role": "assistant"}]},
    "Row 2: 'messages', message 1 has parts that are not text": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
    },
    "Row 2 is not an object": [1],
    "Row 2: 'tools' is not JSON": {**SINGLE, "tools": "{"},
    "Row 2: 'tools' is not a list": {**SINGLE, "tools": "{}"},
    "Row 2: 'tools' is nested too deeply": {**SINGLE, "tools": "[" * 100_000},
    "Row 2: 'tools' holds one half of a surrogate pair": {**SINGLE, "tools": [{"name": "\ud800"}]},
    "Row 2: 'messages', message 1 holds one half of a surrogate pair": {
        "messages": [{**SINGLE["messages"][0], "name": "\ud800"}, SINGLE["messages"][1]]
    },
}


@pytest.mark.parametrize("sentence", WRONG)
def test_an_invalid_row_raises_a_clear_error(sentence, run_script, models, tmp_path):
    path, out = tmp_path / "rows.json", tmp_path / "out"
    path.write_text(json.dumps([SINGLE, WRONG[sentence]]))
    code, _, err = run_script("scripts/prepare_chat.py", "--data_file", path, "--checkpoint_dir", models["chatml"],
                              "--output_dir", out)  # fmt: skip
    line = err.splitlines()[-1]
    assert code == 1 and line.startswith(f"error: {path}: {sentence}") and line.endswith(".")
    assert not out.exists()


# == preferences ==


def pairs_in(folder: Path, tokenizer: Tokenizer) -> set[tuple[str, ...]]:
    names = {i: text for text, i in tokenizer.chat_engine.control.items()}
    show = lambda ids: "".join(names.get(i) or tokenizer.decode([i]) for i in ids.tolist())  # noqa: E731
    return {
        tuple(show(row[name]) for name in ("prompt", "chosen", "rejected"))
        for split in ("train", "test")
        for row in PreferenceData(folder, split, tokenizer).rows
    }


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CAT, SAT, ATE = message("user", "the cat"), message("assistant", "sat"), message("assistant", "ate")
PAIRS = [
    {"prompt": [CAT], "chosen": [SAT], "rejected": [ATE]},  # as in TRL
    {"prompt": "the dog", "chosen": [message("user", "the dog"), SAT], "rejected": [message("user", "the dog"), ATE]},
    {"chosen": [message("user", "hat"), ATE, message("user", "why"), SAT],
     "rejected": [message("user", "hat"), ATE, message("user", "why"), ATE]},
    {"prompt": "the rat", "chosen": [SAT], "rejected": [ATE]},
    {"prompt": [message("system", "Be kind."), CAT], "chosen": "sat", "rejected": "ate"},
    {"prompt": [CAT], "chosen": [SAT, CAT], "rejected": [ATE]},
    {"prompt": "x", "chosen": [CAT, SAT], "rejected": [message("user", "other"), SAT]},
    {"prompt": [message("system", "Be kind.")], "chosen": "sat", "rejected": "ate"},
    {"prompt": [], "chosen": [SAT], "rejected": [ATE]},
    {"prompt": [CAT], "chosen": [SAT], "rejected": []},
]  # fmt: skip


def test_the_tokens_of_chats_depend_on_tokenizer_json(models, tmp_path):
    """Chats are encoded with it, even if the tokenizer of plain texts is tokenizer.model."""
    folder = shutil.copytree(models["llama3"], tmp_path / "model")
    before = hash_chat_tokens(Tokenizer(folder))
    assert before == hash_chat_tokens(Tokenizer(models["llama3"])) != hash_chat_tokens(Tokenizer(models["chatml"]))
    with (folder / "tokenizer.json").open("a") as file:
        file.write("\n")
    tokenizer = Tokenizer(folder)
    assert hash_chat_tokens(tokenizer) != before
    check_tokenizer(folder, tokenizer.identity, tokenizer)  # a dataset of an earlier version
    meta = {**tokenizer.identity, "chat_tokens_sha256": hash_chat_tokens(tokenizer)}
    check_tokenizer(folder, meta, tokenizer)
    with pytest.raises(UserError, match=r"special or stop tokens, or another tokenizer\.json, than .*model has; prep"):
        check_tokenizer(folder, {**meta, "chat_tokens_sha256": before}, tokenizer)


def test_a_removed_chat_template_is_named_as_the_cause(models, tmp_path):
    """Without it, the tokens of chats are others, too."""
    folder = shutil.copytree(models["llama3"], tmp_path / "model")
    tokenizer = Tokenizer(folder)
    meta = {**tokenizer.identity, "chat_tokens_sha256": hash_chat_tokens(tokenizer),
            "chat_template_sha256": tokenizer.template.sha256}  # fmt: skip
    check_tokenizer(folder, meta, tokenizer)
    tokenizer.template = None
    with pytest.raises(UserError, match="a different chat template"):
        check_tokenizer(folder, meta, tokenizer)


def test_the_tokens_of_chats_depend_on_the_stop_tokens(models, tmp_path):
    """An answer whose last token is not one of them gets EOS."""
    folder = shutil.copytree(models["llama3"], tmp_path / "model")
    before = Tokenizer(folder)
    other = next(i for i in range(before.vocab_size) if i not in before.stop_ids)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [before.eos_id, other]}))
    after = Tokenizer(folder)
    assert after.identity == before.identity and other in after.stop_ids
    assert hash_chat_tokens(after) != hash_chat_tokens(before)


def test_cached_tokens_of_texts_depend_on_the_special_tokens(base_dir, tmp_path):
    for name in ("tokenizer.model", "lit_config.json"):
        shutil.copy(base_dir / name, tmp_path)
    before = Tokenizer(tmp_path)
    piece = before.engine.processor.id_to_piece(before.encode("the cat")[0])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"additional_special_tokens": [piece]}))
    assert Tokenizer(tmp_path).encode("the cat") != before.encode("the cat") and before.template is None
    assert hash_chat_tokens(Tokenizer(tmp_path)) != hash_chat_tokens(before)


def test_preferences_may_be_lists_of_messages(prepare, models):
    flags = {"script": "prepare_beaver_safe"}
    folder, err = prepare(PAIRS, models["chatml"], "--data_format", "preference", "--prompt_style", "chat", **flags)
    tokenizer = Tokenizer(models["chatml"])
    render = tokenizer.template.render
    questions = [[CAT], [message("user", "the dog")], [message("user", "hat"), ATE, message("user", "why")],
                 [message("user", "the rat")], [message("system", "Be kind."), CAT]]  # fmt: skip
    assert pairs_in(folder, tokenizer) == {(str(render(q)), "sat<|im_end|>", "ate<|im_end|>") for q in questions}
    assert "Omitted 2 rows that do not end with an answer." in err
    assert "Omitted 1 rows with dialogues that differ before the last answer." in err
    assert "Omitted 2 rows whose last answer follows no question." in err
    folder, _ = prepare(PAIRS, models["chatml"], "--data_format", "preference", "--prompt_style", "hh", **flags)
    prompts = {pair[0] for pair in pairs_in(folder, tokenizer)}
    assert "Human: hat Assistant: ate Human: why Assistant: " in prompts
    assert "Human: Be kind.\n\nthe cat Assistant: " in prompts


@pytest.mark.parametrize("name", ["alpaca", "beaver_safe", "chat", "metamath"])
def test_the_output_folder_is_checked_before_the_rows_are_read(name, refused, base_dir, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").touch()
    flags = ("--checkpoint_dir", base_dir, "--output_dir", tmp_path / "out", "--data_file", tmp_path / "missing.json")
    assert "holds thesis.tex, which is not part" in refused(f"scripts/prepare_{name}.py", *flags)


def test_other_scripts_accept_the_chat_style(prepare, models):
    rows = [{"instruction": f"cat {i} <|im_end|>", "input": "now", "output": f"sat {i}"} for i in range(6)]
    tokenizer = Tokenizer(models["chatml"])
    folder, _ = prepare(rows, models["chatml"], "--prompt_style", "chat", script="prepare_alpaca")
    assert label_texts(folder, tokenizer) == {(f"sat {i}<|im_end|>",) for i in range(6)}
    pairs = [pair for split in ("train", "test") for pair in SFTData(folder, split, tokenizer).prompts(9)]
    prompts = {tokenizer.decode(prompt) for prompt, _ in pairs}
    assert any("user\ncat 3 <|im_end|>\nnow" in prompt for prompt in prompts)
    folder, _ = prepare(rows, models["chatml"], "--prompt_style", "chat", "--stage", "rl", script="prepare_alpaca")
    assert read_meta(folder, "lit-llama-prompts-1")["prompt_style"] == "chat"


# == training ==


def test_training_counts_only_the_answers_and_generation_uses_the_style(prepare, models, run_script, tmp_path):
    rows = [MESSAGES, SHAREGPT, SINGLE, {"messages": [message("user", "cat"), SAT] * 3}]
    folder, _ = prepare(rows, models["chatml"])
    out = tmp_path / "run"
    flags = ("--checkpoint_dir", models["chatml"], "--accelerator", "cpu")
    code, _, err = run_script(
        "finetune/aligner.py", "--data_dir", folder, "--out_dir", out, *flags, "--epochs", 2, "--batch_size", 2,
        "--micro_batch_size", 2, "--adapter_start_layer", 1, "--eval_interval", 1, "--max_new_tokens", 4,
    )  # fmt: skip
    assert code == 0, err
    adapter = read_adapter(out)
    assert adapter.meta["prompt_style"] == "chat"
    data = SFTData(folder, "train", Tokenizer(models["chatml"]))
    assert data.weights.sum() == sum(len(r["input_ids"]) - r["prompt_length"] - (r["gaps"][1::2] - r["gaps"][::2]).sum()
                                     for r in data.rows)  # fmt: skip
    answer = ("generate/aligner.py", "--adapter", out, *flags, "--prompt", "the cat", "--max_new_tokens", 5)
    code, text, err = run_script(*answer)
    assert code == 0 and text.endswith("\n"), err
    code, _, _ = run_script(*answer, "--system", "Be kind.", "--prompt_style", "alpaca")
    assert code == 0
    code, _, err = run_script("generate/aligner.py", "--checkpoint_dir", "checkpoints/microworld", "--prompt_style",
                              "chat")  # fmt: skip
    assert code == 1 and "needs a chat template" in err


def test_generation_uses_the_template_variables_of_training(prepare, models, run_script, tmp_path):
    style = "chat:enable_thinking=false"
    folder, _ = prepare([MESSAGES, SHAREGPT, SINGLE], models["thinking"], "--prompt_style", style)
    flags = ("--checkpoint_dir", models["thinking"], "--accelerator", "cpu")
    code, _, err = run_script("finetune/aligner.py", "--data_dir", folder, "--out_dir", tmp_path / "run", *flags,
                              "--max_steps", 1, "--adapter_start_layer", 1, "--max_new_tokens", 2)  # fmt: skip
    assert code == 0, err
    assert read_adapter(tmp_path / "run").meta["prompt_style"] == style
    code, _, err = run_script("generate/aligner.py", "--adapter", tmp_path / "run", *flags, "--prompt", "the cat",
                              "--max_new_tokens", 5, "--output_file", tmp_path / "answers.jsonl")  # fmt: skip
    assert code == 0, err
    assert f'"style": "{style}"' in (tmp_path / "answers.jsonl").read_text()


def test_a_dataset_prepared_with_another_template_is_refused(prepare, models, tmp_path, refused):
    folder, _ = prepare([MESSAGES, SHAREGPT, SINGLE], models["chatml"])
    (models["chatml"] / "chat_template.jinja").write_text("{{ messages }}")
    try:
        sentence = refused("finetune/aligner.py", "--data_dir", folder, "--out_dir", tmp_path / "run",
                           "--checkpoint_dir", models["chatml"])  # fmt: skip
    finally:
        (models["chatml"] / "chat_template.jinja").unlink()
    assert "was prepared with a different chat template" in sentence


def test_an_invalid_multi_turn_entry_is_refused(prepare, models):
    folder, _ = prepare([MESSAGES, SHAREGPT, SINGLE], models["chatml"])
    meta = json.loads((folder / "meta.json").read_text())
    for multi_turn, sentence in ((3, "multi_turn is 3; expected true or false"),):
        (folder / "meta.json").write_text(json.dumps({**meta, "multi_turn": multi_turn}))
        with pytest.raises(UserError, match=sentence):
            SFTData(folder, "train", Tokenizer(models["chatml"]))


def test_the_merged_model_keeps_the_chat_template_and_the_stop_tokens(models, tmp_path, run_script):
    transformers = pytest.importorskip("transformers")
    for kind in ("chatml", "mistral", "llama3"):
        state, config = {}, LLaMAConfig.from_json(models[kind] / "lit_config.json")
        generator = torch.Generator().manual_seed(1)
        state["global_value_embedding.weight"] = torch.randn(1, config.n_embd, generator=generator)
        for layer in (1, 2):
            state[f"transformer.h.{layer}.attn.gating_factor"] = torch.ones(1, config.n_head, 1, 1)
        meta = {"method": "aligner", "config": {"adapter_prompt_length": 1, "adapter_start_layer": 1},
                "prompt_style": "chat"}  # fmt: skip
        save_adapter(tmp_path / f"{kind}.safetensors", state, meta)
        for removed in ((), ("tokenizer.json",)) if kind == "mistral" else ((),):
            source, out = tmp_path / f"{kind}{len(removed)}", tmp_path / f"merged-{kind}{len(removed)}"
            shutil.copytree(models[kind], source)
            for name in removed:
                (source / name).unlink()
            code, _, err = run_script("scripts/merge_aligner.py", "--checkpoint_dir", source, "--adapter",
                                      tmp_path / f"{kind}.safetensors", "--output_dir", out)  # fmt: skip
            assert code == 0, err
            reference, tokenizer = transformers.AutoTokenizer.from_pretrained(out), Tokenizer(source)
            messages = [message("user", "Hello <|im_end|>")]
            ids = reference.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
            )
            assert reference.decode(ids) == reference.decode(tokenizer.encode(tokenizer.template.render(messages)))
            eos_ids = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
            end = tokenizer.chat_engine.control[tokenizer.template.end_of_turn]
            assert end in (eos_ids if isinstance(eos_ids, list) else [eos_ids])


# == the page ==


def test_the_example_and_the_python_code_of_the_page_run(models, run_script, tmp_path, monkeypatch, capsys):
    page, root = (ROOT / "howto" / "chat.md").read_text(encoding="utf-8"), tmp_path / "checkpoints"
    root.mkdir()
    (root / "SmolLM2-135M-Instruct").symlink_to(models["chatml"])
    code, _, err = run_script("scripts/prepare_chat.py", "--data_file", ROOT / "howto/examples/conversations.jsonl",
                              "--checkpoint_dir", models["chatml"], "--output_dir", tmp_path / "data/my_chats",
                              "--num_proc", 1)  # fmt: skip
    assert code == 0 and "6 rows. Dropped: 0 with an empty text, 0 with too long a prompt. 0 conversations" in err, err
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(compile(block, "chat.md", "exec"), {})
    assert "Let us" in capsys.readouterr().out.splitlines()[-1]
