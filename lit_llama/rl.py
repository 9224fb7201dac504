"""Reinforcement learning from a reward per answer: group-relative policy optimization (GRPO, arXiv 2402.03300).

For each prompt, a group of G answers o_1 … o_G is sampled from the policy π_old, and each answer gets a reward r_i. The
objective, which is maximized, is the mean over prompts of

    1/G Σ_i 1/L_i Σ_t [ min(ρ_t·A_i, clip(ρ_t, 1 - ε, 1 + ε)·A_i) - β·KL_t ],    ρ_t = π(o_i,t) / π_old(o_i,t)

This is equation 3 of that paper, with the advantages A_i of its section 4.1.2 and KL_t of its equation 4. L_i is the
number of tokens of answer i. Dr. GRPO (arXiv 2503.20783, section 3.2) uses the same L for all answers and does not
divide the advantages by the standard deviation of the rewards; both are options here.
"""

import torch
from torch import Tensor

from lit_llama.modules import eval_mode, swapped_parameters
from lit_llama.run.train_settings import LengthTerm

STD_EPSILON = 1e-4  # added to the standard deviation, so that rounding errors in equal rewards are not amplified


def group_advantages(rewards: Tensor, divide_by_std: bool = True) -> Tensor:
    """Return the advantage of each answer over its group: A_i = (r_i - mean(r)) / (std(r) + 1e-4).

    If all rewards of a group are equal, its advantages are 0.

    Args:
        rewards: (prompts, G).
        divide_by_std: False leaves out the division, as Dr. GRPO does.

    Returns:
        (prompts, G).
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if divide_by_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True, correction=0) + STD_EPSILON)
    return advantages


def answer_weights(lengths: Tensor, group_size: int, length_term: LengthTerm, max_new_tokens: int) -> Tensor:
    """Return the weight of each token of an answer, 1 / (G·L_i): (answers,).

    Args:
        lengths: (answers,) number of tokens of each.
        length_term: "answer" sets L_i to the length of the answer (GRPO), "constant" to `max_new_tokens` (Dr. GRPO).
    """
    per_answer = lengths if length_term == "answer" else torch.full_like(lengths, max_new_tokens)
    return 1.0 / (group_size * per_answer)


def clipped_objective(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Return min(ρA, clip(ρ, 1 - ε, 1 + ε)·A) of each token, (n,), with ρ = exp(logp - old logp).

    Args:
        logps, old_logps: (n,) log-probabilities under the policy and the one that sampled the answers, in nats.
        advantages: (n,) advantage of each token's answer.
        clip: ε.
    """
    ratio = (logps - old_logps).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def kl_estimates(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Return the estimate π_ref/π - log(π_ref/π) - 1 of each token, (n,), 0 or more.

    For tokens sampled from π its mean is the KL divergence of π to π_ref.
    """
    difference = reference_logps - logps
    return difference.exp() - difference - 1


def answer_logps(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the log-probability of each token of the answers in a batch of `lit_llama.rollouts.Rollouts`, (n,)."""
    return model(batch["idx"], batch["labels"], batch["label_index"], batch["segments"])


class PolicyLoss:
    """Minus the objective, for a batch of prompts with all answers to each, and the metrics that are logged with it.

    Args:
        clip: ε, above 0 and below 1.
        kl_weight: β, 0 or more.
        start: Adapter weights of π_ref, the policy that training starts from; used if β is above 0.
    """

    def __init__(self, *, clip: float, kl_weight: float, start: dict[str, Tensor]) -> None:
        self.clip, self.kl_weight, self.start = clip, kl_weight, start

    def __call__(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return sums over the prompts of a batch of `lit_llama.rollouts.Rollouts`.

        Returns:
            loss; clipped: the share of tokens whose gradient the clip removes; entropy: minus the mean log-probability
            of an answer's tokens, which estimates the entropy in nats per token; kl_per_token: the mean KL_t of an
            answer's tokens, if β is above 0.
        """
        weight, mean_weight, advantages = batch["weights"], batch["mean_weights"], batch["advantages"]
        reference = self.reference_logps(model, batch) if self.kl_weight else None
        logps = answer_logps(model, batch)
        old = batch.get("old_logps", logps.detach())
        objective = clipped_objective(logps, old, advantages, self.clip)
        ratio = (logps.detach() - old).exp()
        outside = torch.where(advantages > 0, ratio > 1 + self.clip, ratio < 1 - self.clip) & (advantages != 0)
        sums = {
            "clipped": (mean_weight * outside).sum(),
            "entropy": -(mean_weight * logps.detach()).sum(),
        }
        if reference is not None:
            kl = kl_estimates(logps, reference)
            objective = objective - self.kl_weight * kl
            sums["kl_per_token"] = (mean_weight * kl.detach()).sum()
        return {"loss": -(weight * objective).sum(), **sums}

    def reference_logps(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the log-probabilities of the labels under π_ref: the same base with other adapter weights."""
        with torch.no_grad(), eval_mode(model), swapped_parameters(model, self.start):
            return answer_logps(model, batch)
