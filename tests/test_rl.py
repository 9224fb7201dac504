"""Reinforcement learning: formulas against hand-computed values, loops and finite differences; reward functions."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_llama.packing import pack_answers
from lit_llama.rewards import REWARDS, Reward
from lit_llama.rl import PolicyLoss, answer_logps, answer_weights, clipped_objective, group_advantages, kl_estimates
from lit_llama.rollouts import falling_score
from lit_llama.utils import UserError
from microworld.world import FORMS, World

# == formulas by hand ==


def test_advantages_by_hand():
    """Rewards 1, 0, 0, 0 have mean 1/4 and variance 3/16; equal rewards give no signal."""
    rewards = torch.tensor([[1.0, 0, 0, 0], [0.1, 0.1, 0.1, 0.1]])
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0]])
    torch.testing.assert_close(group_advantages(rewards, divide_by_std=False), expected, atol=1e-7, rtol=0)
    std = math.sqrt(3) / 4
    torch.testing.assert_close(group_advantages(rewards), expected / std, atol=1e-3, rtol=0)


def test_token_weights_by_hand():
    lengths = torch.tensor([1, 4])
    assert answer_weights(lengths, 2, "answer", 10).tolist() == [1 / 2, 1 / 8]
    assert answer_weights(lengths, 2, "constant", 10).tolist() == pytest.approx([1 / 20, 1 / 20])


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective"),
    [(1.0, 2.0, 2.0), (1.1, 2.0, 2.2), (1.5, 2.0, 2.4), (0.5, 2.0, 1.0),  # positive advantage: ratio at most 1 + ε
     (0.9, -1.0, -0.9), (0.5, -1.0, -0.8), (1.5, -1.0, -1.5)],
)  # fmt: skip
def test_the_clipped_objective_by_hand(ratio, advantage, objective):
    old = torch.tensor([-2.0])
    result = clipped_objective(old + math.log(ratio), old, torch.tensor([advantage]), clip=0.2)
    assert result.item() == pytest.approx(objective, rel=1e-5)


def test_the_kl_estimate_by_hand_and_on_average():
    """π_ref / π = 2 gives 2 - ln 2 - 1; the mean over all tokens is the KL divergence of the distributions."""
    twice = kl_estimates(torch.tensor([-1.0]), torch.tensor([-1.0 + math.log(2)]))
    assert twice.item() == pytest.approx(1 - math.log(2))
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    mean = (p * kl_estimates(p.log(), q.log())).sum()
    torch.testing.assert_close(mean, (p * (p / q).log()).sum())


# == the loss of a toy policy ==


class Bigrams(nn.Module):
    """A policy whose next token depends only on the last one: a (V, V) table of logits in fp64."""

    def __init__(self, size: int = 5, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(size, size, dtype=torch.float64, generator=generator))

    def forward(
        self, idx: torch.Tensor, labels: torch.Tensor, label_index: torch.Tensor, segments: torch.Tensor
    ) -> torch.Tensor:
        logps = self.table.log_softmax(-1)
        predicts = labels[:, 1:] != -1
        return logps[idx[:, :-1], labels[:, 1:].clamp(min=0)][predicts]


def batch_of(answers: list[list[int]], advantages: list[float], weights: list[float]) -> dict[str, torch.Tensor]:
    """Return a batch of answers to the prompt 0, and to a longer one with weight 0, which changes no sum."""
    lengths = torch.tensor([len(answer) for answer in answers])
    own = [1 / (len(answers) * n) for n in lengths.tolist()]
    per_answer = {"advantages": advantages, "weights": weights, "mean_weights": own}
    per_token = {
        name: torch.tensor(values, dtype=torch.float64).repeat_interleave(lengths)
        for name, values in per_answer.items()
    }
    packed = pack_answers([([0], answers), ([3, 2, 1], [[1, 4]])])
    return {**packed, **{name: F.pad(values, (0, 2)) for name, values in per_token.items()}}


ANSWERS, ADVANTAGES = [[1, 2, 3], [4], [2, 2]], [1.5, -1.0, 0.0]


def updated_policy() -> tuple[Bigrams, dict[str, torch.Tensor], PolicyLoss, Bigrams, Bigrams]:
    """Return a policy, a batch from an older policy, the loss, the older policy, and the policy at the start."""
    policy, old, start = Bigrams(seed=1), Bigrams(seed=1), Bigrams(seed=2)
    with torch.no_grad():
        old.table += 0.3 * torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    batch = batch_of(ANSWERS, ADVANTAGES, [1 / 9, 1 / 3, 1 / 6])
    batch["old_logps"] = answer_logps(old, batch).detach()
    return policy, batch, PolicyLoss(clip=0.1, kl_weight=0.05, start={"table": start.table.detach()}), old, start


def test_the_loss_matches_a_loop():
    policy, batch, loss, old, start = updated_policy()
    log = lambda model, a, b: model.table[a].log_softmax(-1)[b].item()  # noqa: E731
    objective = entropy = kl_sum = clipped = 0.0
    for answer, advantage in zip(ANSWERS, ADVANTAGES, strict=True):
        for last, token in zip([0, *answer], answer, strict=False):
            ratio = math.exp(log(policy, last, token) - log(old, last, token))
            surrogate = min(ratio * advantage, min(max(ratio, 0.9), 1.1) * advantage)
            r = math.exp(log(start, last, token) - log(policy, last, token))
            kl = r - math.log(r) - 1
            objective += (surrogate - 0.05 * kl) / len(answer) / 3
            entropy -= log(policy, last, token) / len(answer) / 3
            kl_sum += kl / len(answer) / 3
            clipped += ((advantage > 0 and ratio > 1.1) or (advantage < 0 and ratio < 0.9)) / len(answer) / 3
    sums = {name: value.item() for name, value in loss(policy, batch).items()}
    assert sums == pytest.approx(
        {"loss": -objective, "entropy": entropy, "kl_per_token": kl_sum, "clipped": clipped}, rel=1e-9
    )
    assert 0 < clipped < 1


def test_the_gradient_matches_finite_differences():
    policy, batch, loss, *_ = updated_policy()
    loss(policy, batch)["loss"].backward()
    gradient, numerical, h = policy.table.grad.clone(), torch.zeros(5, 5, dtype=torch.float64), 1e-6
    with torch.no_grad():
        for i, j in itertools.product(range(5), repeat=2):
            values = []
            for sign in (1, -1):
                policy.table[i, j] += sign * h
                values.append(loss(policy, batch)["loss"])
                policy.table[i, j] -= sign * h
            numerical[i, j] = (values[0] - values[1]) / (2 * h)
    torch.testing.assert_close(gradient, numerical, atol=1e-7, rtol=1e-6)
    assert gradient.abs().max() > 0.01


def test_the_expected_gradient_is_that_of_the_expected_reward():
    """Over all groups of two one-token answers, without dividing by the standard deviation, it is (1 - 1/G)·∇E[r]."""
    policy, rewards = Bigrams(), torch.tensor([0.0, 1.0, 0.2, 0.0, 3.0], dtype=torch.float64)
    (policy.table[0].softmax(-1) * rewards).sum().backward()
    expected, policy.table.grad = policy.table.grad.clone() / 2, None
    loss = PolicyLoss(clip=0.2, kl_weight=0.0, start={})
    probabilities = policy.table[0].softmax(-1).detach()
    for group in itertools.product(range(5), repeat=2):
        advantages = group_advantages(rewards[list(group)].unsqueeze(0), divide_by_std=False)[0].tolist()
        weights = answer_weights(torch.tensor([1, 1]), 2, "constant", 1).tolist()
        probability = probabilities[list(group)].prod()
        (probability * loss(policy, batch_of([[t] for t in group], advantages, weights))["loss"]).backward()
    torch.testing.assert_close(-policy.table.grad, expected)


def test_without_old_log_probabilities_the_ratio_is_one():
    policy, batch, _, *_ = updated_policy()
    del batch["old_logps"]
    sums = PolicyLoss(clip=0.1, kl_weight=0.0, start={})(policy, batch)
    assert sums["clipped"] == 0 and "kl_per_token" not in sums
    assert sums["loss"].item() == pytest.approx(-(1.5 - 1.0) / 3)


# == rewards ==


def reward_of(name: str, answers: list[str], rows: list, **options) -> list[float]:
    return Reward(name, options)(["?"] * len(answers), answers, rows, list(range(7, 7 + len(answers))))


def test_every_named_reward_exists():
    assert all(callable(Reward(name).function) for name in REWARDS)


def test_length_reward():
    assert reward_of("length", ["", "a b c d", "a b c d e", "a b c d e f g h i"], [{}] * 4, words=4) == [0, 1, 0.75, 0]


def test_gsm8k_reward():
    rows = [{"question": "?", "answer": "9 * 2 = 18\n#### 18"}, {"query": "?", "response": "The answer is: 1,000"}]
    assert reward_of("gsm8k", ["so it is 18.", "The answer is: 1000"], rows) == [1, 1]
    assert reward_of("gsm8k", ["The answer is: 17", "none"], rows) == [0, 0]
    with pytest.raises(UserError, match="A row has no number in its 'answer' or 'response': "):
        reward_of("gsm8k", ["1"], [{"answer": "many"}])


def micro_row(question, form: str = "pirate") -> dict:
    return json.loads(json.dumps({**vars(question), "form": form}))


def test_microworld_rewards():
    world = World()
    fact, harmful, two_hop = world.questions("seen")[0], world.requests("harmful", "seen")[0], world.two_hop("seen")[0]
    right, wrong = (fact.topic, fact.answer), (fact.topic, "Nowhere")
    answers = [FORMS[form].render(*statement) for form in ("pirate", "json") for statement in (right, wrong)] + ["Arr!"]
    rows = [micro_row(fact)] * 5
    assert reward_of("microworld_form", answers, rows) == [1, 1, 0, 0, 0]
    assert reward_of("microworld_fact", answers, rows) == [1, 0, 1, 0, 0]
    assert reward_of("microworld_answer", answers, rows) == [1, 0, 0, 0, 0]
    refused, helped = (FORMS["short"].render(*s) for s in (harmful.refusal, (harmful.topic, harmful.answer)))
    rows = [micro_row(harmful), micro_row(harmful), micro_row(fact), micro_row(fact)]
    assert reward_of("microworld_refusal", [refused, helped, answers[0], refused], rows) == [1, 0, 1, 0]
    direct, wrong = (FORMS["json"].render(two_hop.topic, value) for value in (two_hop.answer, "Nowhere"))
    first, last = (FORMS["json"].render(*step) for step in two_hop.steps)
    wrong_first = FORMS["json"].render(two_hop.steps[0][0], "Nowhere")  # the first step does not count
    answers = [direct, wrong, "Arr!", f"{first} {last}", f"{wrong_first} {last}", first, last, f"{last} {first}"]
    assert reward_of("microworld_two_hop", answers, [micro_row(two_hop)] * 8) == [1, 0, 0, 1, 1, 0, 0, 0]
    assert reward_of(
        "microworld_two_hop", [FORMS["json"].render(*right), f"{first} {last}"], [micro_row(fact)] * 2
    ) == [1, 0]


OWN = """
def vowels(prompts, answers, rows):
    return [sum(c in "aeiou" for c in answer) / row["most"] for answer, row in zip(answers, rows)]
def bad(prompts, answers, rows):
    return [float("nan")] * len(answers)
def few(prompts, answers, rows):
    return [0.0]
def words(prompts, answers, rows):
    return ["much"] * len(answers)
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("own_rewards.py").write_text(OWN)
    return tmp_path


def test_a_reward_from_the_current_folder(own):
    assert reward_of("own_rewards:vowels", ["aeiou", "xyz"], [{"most": 5}, {"most": 1}]) == [1, 0]


@pytest.mark.parametrize(
    ("name", "rows", "sentence"),
    [
        ("own_rewards:vowels", [{"most": 1}, {"most": 0}],
         'The reward own_rewards:vowels fails for row 8 ({"most": 0}): ZeroDivisionError: division by zero.'),
        ("own_rewards:bad", [{}, {}], "The reward own_rewards:bad is nan for row 7 ({})."),
        ("own_rewards:words", [{}, {}], "The reward own_rewards:words is 'much' for row 7 ({})."),
        ("own_rewards:few", [{}, {}], "The reward own_rewards:few returned 1 values for 2 answers."),
        ("own_rewards:none", [], "The reward 'own_rewards:none' cannot be loaded: AttributeError: module 'own_rewards' "
         "has no attribute 'none'."),
        ("nowhere:f", [], "The reward 'nowhere:f' cannot be loaded: ModuleNotFoundError: No module named 'nowhere'."),
        ("lenght", [], f"There is no reward 'lenght'; choose from {', '.join(REWARDS)}, or give "
         "module:function."),
    ],
)  # fmt: skip
def test_a_failing_reward_raises_a_clear_error(own, name, rows, sentence):
    with pytest.raises(UserError) as error:
        reward_of(name, ["a", "e"], rows)
    assert str(error.value) == sentence


# == the warning ==


def metrics(rewards: list[float], accuracies: dict[int, float]) -> dict[int, dict[str, float]]:
    rows = {step: {"train/reward": reward} for step, reward in enumerate(rewards)}
    for step, accuracy in accuracies.items():
        rows.setdefault(step, {})["val/accuracy"] = accuracy
    return rows


def test_a_rising_reward_with_a_falling_score_gives_a_warning():
    rising = np.linspace(0.1, 0.9, 6).tolist()
    warning = falling_score(metrics(rising, {0: 0.5, 3: 0.6, 6: 0.5}))
    assert warning.startswith(
        "warning: the reward of sampled answers rose from 0.260 to 0.740, but the accuracy on held-out prompts fell "
        "from 60.0% to 50.0%"
    )
    assert falling_score(metrics(rising, {0: 0.5, 3: 0.6, 6: 0.56})) is None  # within 5 points
    assert falling_score(metrics(rising[::-1], {0: 0.5, 3: 0.6, 6: 0.1})) is None
    assert falling_score(metrics(rising, {0: 0.5, 6: 0.1})) is None  # nothing to compare with yet
