import math
import shutil

import numpy as np
import pyarrow as pa
import pytest
import test_data
import torch
import toys

from lit_llama import aligner
from lit_llama.checkpoint import load_model
from lit_llama.data import PreferenceData
from lit_llama.dpo import DPOLoss, dpo_loss, sequence_logps, sum_logps_by_row
from lit_llama.logps import LabelLogps
from lit_llama.modules import swapped_parameters
from lit_llama.packing import pair_shape
from lit_llama.prepare import prepare_preferences
from lit_llama.reference import adapter_reference, stored_reference
from lit_llama.utils import UserError

# h = (-1 + 3) - (-2 + 2.5) = 1.5
LOGPS = tuple(torch.tensor([x]) for x in (-1.0, -3.0, -2.0, -2.5))


@pytest.fixture
def policy(base_dir):
    """Return an Aligner with open gates on the frozen tiny base."""
    torch.manual_seed(0)
    method_config = {"adapter_prompt_length": 2, "adapter_start_layer": 1}
    model = load_model(base_dir, method="aligner", method_config=method_config)
    for attn in toys.prefix_layers(model):
        torch.nn.init.normal_(attn.gating_factor)
    aligner.mark_only_adapter_as_trainable(model)
    return model


def adapter_state(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def write_pairs(folder, tokenizer, pairs, **changes):
    settings = dict(max_seq_length=60, test_fraction=0.3, seed=0, num_proc=1, about={"prompt_style": "plain"})
    return prepare_preferences(
        pairs, lambda row, number: row, output_dir=folder, tokenizer=tokenizer, **{**settings, **changes}
    )


def test_a_batch_of_prompts_that_are_too_long_does_not_change_the_type_of_the_tokens(tmp_path, tokenizer):
    """The rows are processed in batches of 1,000."""
    long = [("the cat sat on the mat " * 20, "yes", "no")] * 1000
    meta = write_pairs(tmp_path / "pairs", tokenizer, long + [(f"the cat {i}", "yes", "no") for i in range(9)])
    assert (meta["counts"]["too_long"], meta["counts"]["train"] + meta["counts"]["test"]) == (1000, 9)


# == the loss, computed by hand ==


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        (dict(beta=2.0), 0.0485873516),  # log(1 + e^-3)
        (dict(beta=2.0, label_smoothing=0.25), 0.7985873516),  # 0.75 · 0.04858735 + 0.25 · 3.04858735
        (dict(beta=0.5, loss_type="ipo"), 0.25),  # (1.5 - 1)²
        (dict(beta=0.25, loss_type="ipo"), 0.25),  # (1.5 - 2)²
        (dict(beta=0.5, loss_type="hinge"), 0.25),  # 1 - 0.75
        (dict(beta=1.0, loss_type="hinge"), 0.0),
    ],
)
def test_each_loss_matches_a_computation_by_hand(settings, loss):
    losses, _, _ = dpo_loss(*LOGPS, **settings)
    assert losses.shape == (1,)
    assert losses.item() == pytest.approx(loss, abs=1e-7)


def test_rewards_are_beta_times_policy_minus_reference_without_gradient():
    policy = torch.tensor([-1.0], requires_grad=True)
    _, chosen, rejected = dpo_loss(policy, *LOGPS[1:], beta=0.5)
    assert (chosen.item(), rejected.item()) == (0.5, -0.25)
    assert not chosen.requires_grad


def test_the_gradient_of_the_sigmoid_loss():
    """The gradient of -log σ(βh) is -β·σ(-βh) for the chosen response and its negative for the rejected one."""
    chosen, rejected = (x.clone().requires_grad_() for x in LOGPS[:2])
    dpo_loss(chosen, rejected, *LOGPS[2:], beta=2.0)[0].sum().backward()
    expected = 2 / (1 + math.exp(3))
    assert chosen.grad.item() == pytest.approx(-expected, rel=1e-5)
    assert rejected.grad.item() == pytest.approx(expected, rel=1e-5)


def test_a_confident_wrong_policy_has_a_finite_loss():
    losses, _, _ = dpo_loss(torch.tensor([-900.0]), *LOGPS[1:], beta=5.0)
    assert losses.item() == pytest.approx(5 * 897.5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(beta=0.0), "beta is 0.0"),
        (dict(label_smoothing=0.5), "label_smoothing 0.5; they must"),
        (dict(label_smoothing=0.1, loss_type="ipo"), "only the sigmoid loss"),
        (dict(loss_type="kto"), "no loss type 'kto'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        dpo_loss(*LOGPS, **settings)


# == log-probabilities of responses ==


def test_sequence_logps_match_a_computation_by_hand():
    """Token 0 has probability 1/4 (logit 0 against log 3), token 1 has 3/4."""
    logits = torch.tensor([0.0, math.log(3)]).expand(2, 4, 2).clone()
    labels = torch.tensor([[-1, 0, 1, 1], [0, -1, -1, 1]])
    before = labels.clone()
    expected = [math.log(1 / 4 * 3 / 4 * 3 / 4), math.log(3 / 4)]  # nothing predicts the first token
    assert sequence_logps(logits, labels).tolist() == pytest.approx(expected)
    assert torch.equal(labels, before)
    # logits at positions that predict no label are ignored
    logits[0, 3], logits[1, :2] = torch.tensor([5.0, -5.0]), torch.inf
    assert sequence_logps(logits, labels).tolist() == pytest.approx(expected)


def test_sequence_logps_are_summed_in_fp32():
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 301, 50).bfloat16(), torch.randint(50, (1, 301))
    exact = logits.double().log_softmax(-1)[0, :-1].gather(1, labels[0, 1:, None]).sum()
    result = sequence_logps(logits, labels)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(exact.item(), abs=2e-3)  # bf16 near -1300 has steps of 8


def test_label_logps_summed_by_row_equal_sequence_logps(policy, preference_dir):
    data = PreferenceData(preference_dir, "train")
    batch = data.batch(np.arange(len(data)))
    logps = sum_logps_by_row(policy.label_logps(batch["idx"], batch["labels"]), batch["labels"])
    torch.testing.assert_close(logps, sequence_logps(policy(batch["idx"]), batch["labels"]), atol=1e-4, rtol=0)


def test_padding_and_other_rows_do_not_change_the_loss(policy, preference_dir):
    data, loss = PreferenceData(preference_dir, "train"), DPOLoss(None)
    batched = loss(LabelLogps(policy), data.batch(np.arange(len(data))))
    per_row = [loss(LabelLogps(policy), data.batch(np.array([row]))) for row in range(len(data))]
    assert len(set(data.lengths)) > 5
    for name, value in batched.items():
        assert value.item() == pytest.approx(sum(one[name].item() for one in per_row), abs=2e-3, rel=1e-5), name


def test_prompt_tokens_are_context_and_never_targets(policy, preference_dir):
    data = PreferenceData(preference_dir, "train")
    batch = data.batch(np.arange(3))
    rows = data.rows[:3]
    for i, side in ((0, "chosen"), (3, "rejected")):
        for j in range(3):
            n, response = len(rows["prompt"][j]), rows[side][j].tolist()
            labels = batch["labels"][i + j].tolist()
            assert labels[:n] == [-1] * n
            assert labels[n : n + len(response)] == response
            assert set(labels[n + len(response) :]) <= {-1}
            assert batch["idx"][i + j][: n + len(response)].tolist() == rows["prompt"][j].tolist() + response
    # log-probability of a response, token by token, each given the text before it
    prompt, response = (rows[name][0].tolist() for name in ("prompt", "chosen"))
    expected = 0.0
    for i, token in enumerate(response):
        expected += policy(torch.tensor([prompt + response[:i]]))[0, -1].log_softmax(-1)[token].item()
    policy_logps = sum_logps_by_row(policy.label_logps(batch["idx"], batch["labels"]), batch["labels"])
    assert policy_logps[0].item() == pytest.approx(expected, abs=1e-4)


# == the loss of a batch ==


def test_losses_with_a_different_model_as_the_reference(policy, base_dir, preference_dir):
    """The sums and the gradients equal those of two separate models."""
    data = PreferenceData(preference_dir, "train")
    reference = load_model(
        base_dir, method="aligner", method_config={"adapter_prompt_length": 2, "adapter_start_layer": 1}
    )
    state = {name: torch.randn_like(value) for name, value in adapter_state(policy).items()}
    reference.load_state_dict(state)
    batch = data.batch(np.arange(len(data)))
    sums = DPOLoss(adapter_reference(state), beta=0.3, sft_weight=0.7)(LabelLogps(policy), batch)
    sums["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}
    policy.zero_grad()

    n = len(data)
    with torch.no_grad():
        reference_chosen = sequence_logps(reference(batch["idx"][:n]), batch["labels"][:n])
        reference_rejected = sequence_logps(reference(batch["idx"][n:]), batch["labels"][n:])
    chosen = sequence_logps(policy(batch["idx"][:n]), batch["labels"][:n])
    rejected = sequence_logps(policy(batch["idx"][n:]), batch["labels"][n:])
    h = (chosen - rejected) - (reference_chosen - reference_rejected)
    dpo = torch.log1p(torch.exp(-0.3 * h)).sum()
    sft = -sum(logp / len(row["chosen"]) for logp, row in zip(chosen, data.rows, strict=True))
    (dpo + 0.7 * sft).backward()
    expected = {
        "loss": dpo + 0.7 * sft,
        "dpo_loss": dpo,
        "sft_loss": sft,
        "reward_accuracy": (h > 0).sum(),
        "chosen_reward": 0.3 * (chosen - reference_chosen).sum(),
        "rejected_reward": 0.3 * (rejected - reference_rejected).sum(),
        "margin": 0.3 * h.sum(),
        "chosen_logp": chosen.sum(),
        "rejected_logp": rejected.sum(),
    }
    assert sums.keys() == expected.keys()
    assert 0 < expected["reward_accuracy"] < n
    for name, value in expected.items():
        assert sums[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-2), name
    for name, p in policy.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-3)


def test_pairs_that_share_a_row_have_the_same_losses_and_gradients(policy, preference_dir):
    data, results = PreferenceData(preference_dir, "train"), []
    state = {name: torch.randn_like(value) for name, value in adapter_state(policy).items()}
    for width in (0, 10**6):
        data.n_embd = width
        batch = data.batch(np.arange(len(data)))
        sums = DPOLoss(adapter_reference(state), beta=0.3, sft_weight=0.7)(LabelLogps(policy), batch)
        sums["loss"].backward()
        gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}
        results.append(({name: value.detach() for name, value in sums.items()}, gradients, len(batch["idx"])))
        policy.zero_grad()
    (separate, separate_gradients, n_separate), (packed, packed_gradients, n_packed) = results
    assert (n_separate, n_packed) == (2 * len(data), len(data))
    assert 0 < separate["reward_accuracy"] < len(data)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(packed_gradients, separate_gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("lengths", "n_embd", "shape"), [
    ([(33, 25, 19), (30, 20, 22)], 192, (2, 78)),  # 33 + 25 + 19 + 1
    ([(33, 25, 19), (30, 20, 22)], 0, (4, 58)),
    ([(2048, 2048, 2048)], 4096, (2, 4096)),  # attention would cost more than the prompt
    ([(2048, 1024, 1024)], 4096, (1, 4097)),
    ([(500, 10, 10), (10, 500, 500)], 4096, (4, 510)),  # 2 · 1,011 tokens, with padding, are not a tenth fewer
    ([(500, 10, 10), (400, 100, 10)], 4096, (2, 521)),
])  # fmt: skip
def test_the_shape_of_a_batch_of_pairs(lengths, n_embd, shape):
    n_prompt, *n_responses = np.array(lengths).T
    assert pair_shape(n_prompt, np.stack(n_responses), n_embd) == shape


def test_the_shape_is_that_of_the_batch(preference_dir):
    data, shapes = PreferenceData(preference_dir, "train"), set()
    for width in (0, 10**6):
        data.n_embd = width
        for indices in (np.arange(3), np.arange(len(data)), np.array([5])):
            batch = data.batch(indices)
            assert tuple(batch["idx"].shape) == data.shape(indices)
            assert ("segments" in batch) == (data.shape(indices)[0] == len(indices))
            shapes.add(len(batch["idx"]) / len(indices))
    assert shapes == {1, 2}


def test_pairs_share_rows_where_that_saves_work(preference_dir, monkeypatch):
    """The decision depends on the mean lengths in the batch and on the width of the model."""
    data, calls = PreferenceData(preference_dir, "train"), []
    monkeypatch.setattr("lit_llama.packing.answers_per_row", lambda *args: calls.append(args) or 1)
    rows = data.rows[:3]
    prompt, answers = (
        sum(len(ids) for name in names for ids in rows[name]) for names in (("prompt",), ("chosen", "rejected"))
    )
    assert "segments" not in data.batch(np.arange(3)) and calls == []
    data.n_embd = 64
    assert "segments" not in data.batch(np.arange(3)) and calls == [(prompt / 3, answers / 6, 2, 64)]


def test_a_stored_reference_returns_the_log_probabilities_of_the_batch(policy, preference_dir):
    data = PreferenceData(preference_dir, "train")
    logps = torch.arange(2.0 * len(data)).view(-1, 2)
    batch = data.batch(np.array([4, 0, 7]))
    assert stored_reference(logps)(LabelLogps(policy), batch).tolist() == [8, 0, 14, 9, 1, 15]
    metrics = DPOLoss(stored_reference(logps), beta=0.3)(LabelLogps(policy), batch)
    expected = 0.3 * (metrics["chosen_logp"] - 22)
    assert metrics["chosen_reward"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_swapped_parameters_are_restored_after_an_exception(policy):
    before = adapter_state(policy)
    zeros = {name: torch.zeros_like(value) for name, value in before.items()}
    with pytest.raises(KeyError), swapped_parameters(policy, zeros):
        assert all(p.abs().sum() == 0 for p in policy.parameters() if p.requires_grad)
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in adapter_state(policy).items())


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        (dict(), math.log(2)),
        (dict(label_smoothing=0.2), math.log(2)),
        (dict(loss_type="ipo", beta=0.25), 4.0),
        (dict(loss_type="hinge"), 1.0),
    ],
)
def test_the_loss_before_the_first_step(settings, start):
    assert DPOLoss(None, **settings).loss_at_start == pytest.approx(start)


def test_batch_shapes_and_token_counts(preference_dir):
    data = PreferenceData(preference_dir, "train")
    batch = data.batch(np.array([3]))
    assert batch["idx"].shape == (2, data.lengths[3])
    row = data.rows[3]
    assert data.tokens[3] == 2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"])
    assert data.weights.tolist() == [1.0] * 20


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_empty_prompts_and_responses_are_refused(tmp_path, preference_dir, monkeypatch, column):
    shutil.copytree(preference_dir, tmp_path / "pairs")
    row = {"prompt": [[1, 5]], "chosen": [[6, 2]], "rejected": [[7, 2]]}
    test_data.write_arrow(
        tmp_path / "pairs/train/data-00000-of-00001.arrow", **{**row, column: pa.array([[]], pa.list_(pa.int64()))}
    )
    monkeypatch.setattr("lit_llama.storage.arrow_files.changed_names", lambda *args: [])
    with pytest.raises(UserError, match="has rows with an empty prompt or response; prepare the dataset again"):
        PreferenceData(tmp_path / "pairs", "train")


# == preparing pairs ==


def test_unusable_pairs_are_dropped_and_truncated_responses_have_no_eos(tmp_path, tokenizer, capsys):
    long = "the cat sat on the mat and the dog ate the hat " * 12
    pairs = [
        ("the cat", " sat", " ate"),
        ("the dog", " sat", " ate"),
        ("the rat", long, " ate"),  # one response is truncated
        ("the hat", " sat", " sat"),  # identical
        ("the mat", long, long + "x"),  # identical after truncation
        ("the dog", " ", " ate"),  # one response is empty
        ("", " sat", " ate"),
        (long, " sat", " ate"),  # the prompt leaves no room for a response
    ]
    meta = write_pairs(tmp_path / "out", tokenizer, pairs)
    assert meta["counts"] == {"rows": 8, "empty": 2, "too_long": 1, "identical": 2, "cut": 1, "prompts": 3, "train": 2,
                              "test": 1}  # fmt: skip
    assert (
        "8 rows. Dropped: 2 with an empty text, 1 with too long a prompt, 2 with equal responses. 1 responses "
        "truncated to 60 tokens. 2 rows for training, 1 for validation."
    ) in capsys.readouterr().err
    rows = {}
    for split in ("train", "test"):
        for row in PreferenceData(tmp_path / "out", split, tokenizer).rows:
            rows[tokenizer.decode(row["prompt"].tolist())] = row
    assert rows.keys() == {"the cat", "the dog", "the rat"}
    eos = tokenizer.eos_id
    for prompt, row in rows.items():
        assert row["prompt"].tolist() == tokenizer.encode(prompt, bos=True)
        assert row["rejected"].tolist() == tokenizer.encode(" ate", eos=True)
    assert rows["the cat"]["chosen"].tolist() == tokenizer.encode(" sat", eos=True)
    cut = rows["the rat"]["chosen"].tolist()
    assert len(rows["the rat"]["prompt"]) + len(cut) == 60
    assert eos not in cut
    assert cut == tokenizer.encode(long)[: len(cut)]


def test_too_few_pairs_and_other_formats_are_refused(tmp_path, tokenizer, data_dir):
    with pytest.raises(UserError, match=r"^0 of 2 rows can be used.* 0 with an empty text, 0 with .* 2 with equal"):
        write_pairs(tmp_path / "out", tokenizer, [("a", " b", " b")] * 2)
    with pytest.raises(UserError, match=r"^0 of 2 rows can be used.* 2 with an empty text"):
        write_pairs(tmp_path / "out", tokenizer, [("a", " b", "")] * 2)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="contains prompts with responses, for SFT; this script needs preference pairs"):
        PreferenceData(data_dir, "train")
