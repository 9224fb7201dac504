"""Direct preference optimization (arXiv 2305.18290): from a batch of pairs to log-probabilities, loss and metrics.

A pair is one prompt with two responses, of which the chosen one is better. The loss compares the policy with a frozen
reference:

    margin = (log π(chosen) - log π(rejected)) - (log π_ref(chosen) - log π_ref(rejected))

Policy and reference share one base model and differ only in their adapter weights (lit_llama/reference.py), so the
reference takes almost no memory.
"""

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from lit_llama.logps import IGNORE_INDEX, find_labels
from lit_llama.run.train_settings import LossType
from lit_llama.utils import UserError

Reference = Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor]  # (model, batch) -> log-probs (2B,)


def sequence_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of the labels of each row.

    Args:
        logits: (B, T, V), any dtype.
        labels: (B, T) token ids, not shifted; -1 where nothing is predicted.

    Returns:
        (B,) fp32 sums over the labels, in nats.
    """
    targets = labels[:, 1:]
    each = -F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none"
    )
    return each.sum(-1)


def sum_logps_by_row(
    logps: torch.Tensor,
    labels: torch.Tensor,
    label_index: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum the log-probabilities (n,) from `LLaMA.label_logps` over the labels of each row, and return the sums (B,).

    If each row holds two answers, return a sum for each answer, (2B,): all first answers, then all second answers.

    Args:
        segments: (B, T) from `lit_llama.packing.pack_answers`, for rows with two answers each.
    """
    index = find_labels(labels) if label_index is None else label_index
    sequences, slots = len(labels), index
    if segments is not None:
        answer = segments.flatten().index_select(0, index) - 1
        sequences, slots = 2 * sequences, index + answer * labels.numel()
    # on a GPU, index_add into (B,) would sum in an order that varies from call to call
    return logps.new_zeros(sequences * labels.size(1)).index_copy(0, slots, logps).view(sequences, -1).sum(-1)


def dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: LossType = "sigmoid",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss of each pair. h = (policy chosen - policy rejected) - (reference chosen - reference rejected)

        sigmoid   -(1 - ε)·log σ(βh) - ε·log σ(-βh)     arXiv 2305.18290, equation 7; ε: ericmitchell.ai/cdpo.pdf
        ipo       (h - 1 / 2β)²                         arXiv 2310.12036, equation 17
        hinge     max(0, 1 - βh)                        arXiv 2309.06657, hinge-norm

    Args:
        policy_chosen_logps, ...: (B,) log-probabilities of complete responses, in nats.
        beta: β, above 0; a larger value keeps the policy closer to the reference.
        label_smoothing: ε, the assumed share of pairs with swapped labels, from 0 to below 0.5.

    Returns:
        losses, chosen rewards, rejected rewards: (B,) each; a reward is β·(policy - reference), without gradient.

    Raises:
        UserError: A setting is out of range or unknown.
    """
    if not 0 < beta < math.inf or not 0 <= label_smoothing < 0.5:
        raise UserError(
            f"beta is {beta} and label_smoothing {label_smoothing}; they must be above 0, and 0 or more and below 0.5."
        )
    if label_smoothing and loss_type != "sigmoid":
        raise UserError(f"label_smoothing is {label_smoothing}; only the sigmoid loss supports it, not {loss_type!r}.")
    # subtracting the reference first makes h exactly 0 where policy and reference are equal
    chosen, rejected = policy_chosen_logps - reference_chosen_logps, policy_rejected_logps - reference_rejected_logps
    h = chosen - rejected
    if loss_type == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    elif loss_type == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    elif loss_type == "hinge":
        losses = torch.relu(1 - beta * h)
    else:
        raise UserError(f"There is no loss type {loss_type!r}; choose from sigmoid, ipo and hinge.")
    return losses, beta * chosen.detach(), beta * rejected.detach()


def pair_logps(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the log-probabilities of a batch of B pairs, (2B,): of the chosen, then of the rejected responses."""
    labels, index, segments = batch["labels"], batch["label_index"], batch.get("segments")
    return sum_logps_by_row(model(batch["idx"], labels, index, segments), labels, index, segments)


class DPOLoss:
    """The DPO loss of a batch of `lit_llama.data.PreferenceData`, and its metrics.

    Args:
        reference: Returns the log-probabilities of a batch under the reference; None is a uniform reference.
        beta, label_smoothing, loss_type: As for `dpo_loss`.
        sft_weight: Weight of the chosen response's mean negative log-likelihood per token, which is added to the loss
            (arXiv 2404.19733, equation 1).

    Raises:
        UserError: A setting is out of range.
    """

    def __init__(
        self,
        reference: Reference | None,
        *,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        loss_type: LossType = "sigmoid",
        sft_weight: float = 0.0,
    ) -> None:
        if not 0 <= sft_weight < math.inf:
            raise UserError(f"sft_weight is {sft_weight}; it must be 0 or more.")
        self.reference, self.beta, self.sft_weight = reference, beta, sft_weight
        self.settings = dict(beta=beta, label_smoothing=label_smoothing, loss_type=loss_type)
        zeros = torch.zeros(1)
        self.loss_at_start = dpo_loss(zeros, zeros, zeros, zeros, **self.settings)[0].item()  # ln 2 for sigmoid

    def __call__(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return sums over the pairs: loss, reward accuracy, rewards (β × nats), margin, log-probabilities (nats)."""
        policy, reference = self.logps(model, batch)
        (chosen, rejected), (reference_chosen, reference_rejected) = policy.chunk(2), reference.chunk(2)
        losses, chosen_rewards, rejected_rewards = dpo_loss(
            chosen, rejected, reference_chosen, reference_rejected, **self.settings
        )
        sums = {"loss": losses.sum()}
        if self.sft_weight:
            each = torch.ones_like(batch["label_index"], dtype=torch.float32)
            n_tokens = sum_logps_by_row(each, batch["labels"], batch["label_index"], batch.get("segments"))
            sft = -(chosen / n_tokens[: len(chosen)]).sum()
            sums = {"loss": sums["loss"] + self.sft_weight * sft, "dpo_loss": sums["loss"], "sft_loss": sft}
        return sums | {
            "reward_accuracy": (chosen_rewards > rejected_rewards).float().sum(),
            "chosen_reward": chosen_rewards.sum(),
            "rejected_reward": rejected_rewards.sum(),
            "margin": (chosen_rewards - rejected_rewards).sum(),
            "chosen_logp": chosen.sum(),
            "rejected_logp": rejected.sum(),
        }

    def logps(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities under policy and reference, (2B,) each, in the order of `pair_logps`."""
        reference = None if self.reference is None else self.reference(model, batch)
        policy = pair_logps(model, batch)
        return policy, torch.zeros_like(policy) if reference is None else reference
