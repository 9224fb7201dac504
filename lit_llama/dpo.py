"""Direct preference optimisation (arXiv 2305.18290): the loss, and preference pairs as the training loop wants them.

A pair is one prompt with two responses, of which the chosen one is better. The loss compares what the policy makes of
the pair with what a frozen reference makes of it:

    margin = (log π(chosen) - log π(rejected)) - (log π_ref(chosen) - log π_ref(rejected))

Policy and reference are one base model with two tiny sets of adapter weights, so the reference costs no memory.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.fabric import Fabric
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

from lit_llama.checkpoint import CONFIG_NAME, weights_path
from lit_llama.data import IGNORE_INDEX, PREFERENCE_FORMAT, Split
from lit_llama.generation import Sampling, generate, remaining_context
from lit_llama.model import LLaMA
from lit_llama.tensor_files import read_state
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError, atomic_write, eval_mode, log, swapped_parameters

LossType = Literal["sigmoid", "ipo", "hinge"]


def sequence_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The log-probability of each row's labels.

    Args:
        logits: (B, T, V), any dtype.
        labels: (B, T) token ids, -1 where nothing is to be predicted, not yet shifted.

    Returns:
        (B,) fp32 sums over the labels, in nats.
    """
    targets = labels[:, 1:]
    each = -F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none"
    )
    return each.sum(-1)


def sum_logps_by_row(logps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What `LLaMA.forward(idx, labels=labels)` returns, (n,) log-probabilities of all labels, as sums per row: (B,)."""
    predicts = labels[:, 1:] != IGNORE_INDEX
    # not index_add, whose order of additions varies from call to call on a GPU
    return logps.new_zeros(predicts.shape).masked_scatter(predicts, logps).sum(-1)


def dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: LossType = "sigmoid",
    reference_free: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of each pair, with h = (policy chosen - policy rejected) - (reference chosen - reference rejected):

        sigmoid   -(1 - ε)·log σ(βh) - ε·log σ(-βh)     arXiv 2305.18290, equation 7; ε: arXiv 2403.00409
        ipo       (h - 1 / 2β)²                         arXiv 2310.12036, equation 17
        hinge     max(0, 1 - βh)                        arXiv 2305.10425, section 2.2

    Args:
        policy_chosen_logps, ...: (B,) log-probabilities of whole responses, in nats.
        beta: β above 0; larger keeps the policy closer to the reference.
        label_smoothing: ε, the share of pairs thought to be labelled the wrong way round, 0 to below 0.5.
        reference_free: compare with a uniform reference instead: both of its log-probabilities count as 0.

    Returns:
        losses, chosen rewards, rejected rewards: (B,) each; a reward is β·(policy - reference), without gradient.

    Raises:
        UserError: a setting is out of range or unknown.
    """
    if not 0 < beta < math.inf or not 0 <= label_smoothing < 0.5:
        raise UserError(
            f"beta is {beta} and label_smoothing {label_smoothing}; they must be above 0, and 0 or more and below 0.5."
        )
    if label_smoothing and loss_type != "sigmoid":
        raise UserError(f"label_smoothing is {label_smoothing} but only the sigmoid loss has one, not {loss_type!r}.")
    if reference_free:
        reference_chosen_logps = reference_rejected_logps = torch.zeros_like(policy_chosen_logps)
    # first each response against the reference: where the two are equal, h is exactly 0
    chosen, rejected = policy_chosen_logps - reference_chosen_logps, policy_rejected_logps - reference_rejected_logps
    h = chosen - rejected
    if loss_type == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    elif loss_type == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    elif loss_type == "hinge":
        losses = torch.relu(1 - beta * h)
    else:
        raise UserError(f"There is no loss type {loss_type!r}; known are sigmoid, ipo and hinge.")
    return losses, beta * chosen.detach(), beta * rejected.detach()


class DPOData(Split):
    """One split of a prepared preference folder, with the DPO loss (`lit_llama.train.Task`).

    The reference is either `reference_logps`, (rows, 2) computed beforehand, or `reference_state`, adapter weights
    that are put in for one more forward pass of every micro-batch; one of them is set before training.

    Args:
        data_dir, split, tokenizer, max_rows: as for `Split`.
        beta, label_smoothing, loss_type, reference_free: as for `dpo_loss`.
        sft_weight: what the mean negative log-likelihood per token of the chosen response counts beside the DPO loss
            (arXiv 2404.19733, equation 1); 0 for plain DPO.

    Raises:
        UserError: no such data, or a setting out of range.
    """

    format = PREFERENCE_FORMAT

    def __init__(
        self,
        data_dir: Path,
        split: str,
        tokenizer: Tokenizer | None = None,
        max_rows: int | None = None,
        *,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        loss_type: LossType = "sigmoid",
        reference_free: bool = False,
        sft_weight: float = 0.0,
    ) -> None:
        super().__init__(data_dir, split, tokenizer, max_rows)
        if not 0 <= sft_weight < math.inf:
            raise UserError(f"sft_weight is {sft_weight}; it must be 0 or more.")
        self.loss = dict(beta=beta, label_smoothing=label_smoothing, loss_type=loss_type, reference_free=reference_free)
        self.sft_weight = sft_weight
        zeros = torch.zeros(1)
        self.loss_at_start = dpo_loss(zeros, zeros, zeros, zeros, **self.loss)[0].item()  # ln 2 for sigmoid
        columns = (self.rows["prompt"], self.rows["chosen"], self.rows["rejected"])
        n_prompt, n_chosen, n_rejected = (np.array([len(ids) for ids in column], int) for column in columns)
        self.lengths = n_prompt + np.maximum(n_chosen, n_rejected)
        self.tokens = 2 * n_prompt + n_chosen + n_rejected
        self.weights = np.ones(len(self))
        self.reference_logps: torch.Tensor | None = None
        self.reference_state: dict[str, torch.Tensor] | None = None

    @property
    def sha256(self) -> str:
        """Hash of all token ids, with the boundaries between them."""
        digest = hashlib.sha256()
        for row in self.rows:
            for name in ("prompt", "chosen", "rejected"):
                ids = np.asarray(row[name], np.int32)
                digest.update(np.int32(len(ids)).tobytes() + ids.tobytes())
        return digest.hexdigest()

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """idx and labels, (2B, T) int64: first all chosen, then all rejected sequences, padded on the right.

        With a precomputed reference also reference, (2B,) fp32.
        """
        rows = self.rows[indices]
        ids, labels = [], []
        for side in ("chosen", "rejected"):
            for prompt, response in zip(rows["prompt"], rows[side], strict=True):
                prompt, response = torch.tensor(prompt).long(), torch.tensor(response).long()
                ids.append(torch.cat((prompt, response)))
                labels.append(torch.cat((torch.full((len(prompt),), IGNORE_INDEX), response)))
        pad = torch.nn.utils.rnn.pad_sequence
        batch = {"idx": pad(ids, batch_first=True), "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX)}
        if self.reference_logps is not None:
            batch["reference"] = self.reference_logps[torch.as_tensor(indices)].T.flatten()
        return batch

    def prompts(self, count: int) -> list[tuple[list[int], list[int]]]:
        """The first rows as (prompt, chosen response) token ids."""
        rows = self.rows[:count]
        return [(p.tolist(), c.tolist()) for p, c in zip(rows["prompt"], rows["chosen"], strict=True)]

    def logps(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities under policy and reference, (2B,) each: of the chosen, then of the rejected responses."""
        idx, labels = batch["idx"], batch["labels"]
        if "reference" in batch:
            reference = batch["reference"]
        elif self.reference_state is not None:
            with torch.no_grad(), eval_mode(model), swapped_parameters(model, self.reference_state):
                reference = sum_logps_by_row(model(idx, labels=labels), labels)
        else:
            assert self.loss["reference_free"], "no reference was set"
            reference = torch.zeros(len(labels), device=labels.device)
        return sum_logps_by_row(model(idx, labels=labels), labels), reference

    def losses(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sums over the pairs: loss, reward accuracy, rewards (β × nats), their margin, log-probabilities (nats)."""
        labels = batch["labels"]
        policy, reference = self.logps(model, batch)
        chosen, rejected = policy.chunk(2)
        losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, *reference.chunk(2), **self.loss)
        sums = {"loss": losses.sum()}
        if self.sft_weight:
            n_chosen = (labels[: len(chosen), 1:] != IGNORE_INDEX).sum(-1)
            sft = -(chosen / n_chosen).sum()
            sums = {"loss": sums["loss"] + self.sft_weight * sft, "dpo_loss": sums["loss"], "sft_loss": sft}
        return sums | {
            "reward_accuracy": (chosen_rewards > rejected_rewards).float().sum(),
            "chosen_reward": chosen_rewards.sum(),
            "rejected_reward": rejected_rewards.sum(),
            "margin": (chosen_rewards - rejected_rewards).sum(),
            "chosen_logp": chosen.sum(),
            "rejected_logp": rejected.sum(),
        }


def adapter_sha256(state: dict[str, torch.Tensor]) -> str:
    """Hash of adapter weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def reference_key(
    data: DPOData,
    checkpoint_dir: Path,
    adapter: str,
    batches: list[np.ndarray],
    fabric: Fabric,
    quantize: str | None = None,
) -> dict[str, str]:
    """Everything the reference's log-probabilities depend on, down to their rounding.

    Args:
        checkpoint_dir: the base; its whole weight file is read.
        adapter: `adapter_sha256` of the reference, or "none".
        batches: the micro-batches they are computed in.
        quantize: how the base is held.
    """
    with weights_path(checkpoint_dir).open("rb") as file:
        base = hashlib.file_digest(file, "sha256")
    base.update((Path(checkpoint_dir) / CONFIG_NAME).read_bytes())
    layout = hashlib.sha256(b"".join(np.asarray([len(b), *b], np.int64).tobytes() for b in batches))
    gpu = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else ""
    return {
        "data": data.sha256,
        "tokenizer": data.meta["tokenizer_sha256"],
        "base": base.hexdigest(),
        "adapter": adapter,
        "batches": layout.hexdigest(),
        "precision": str(fabric.strategy.precision.precision),
        "quantize": str(quantize),
        "device": fabric.device.type + gpu,
        "torch": torch.__version__,
    }


@torch.no_grad()
def compute_reference(
    data: DPOData, fabric: Fabric, model: torch.nn.Module, batches: list[np.ndarray], name: str
) -> torch.Tensor:
    """(rows, 2) fp32 log-probabilities of chosen and rejected responses under the model as it is now.

    They are computed in the micro-batches of training, so that bf16 rounds them as it rounds the policy's. Several
    processes share the work.
    """
    logps = torch.zeros(len(data), 2, device=fabric.device)
    mine = batches[fabric.global_rank :: fabric.world_size]
    for rows in tqdm(mine, desc=f"Reference, {name}", unit="batch", disable=fabric.global_rank > 0):
        batch = fabric.to_device(data.batch(rows))
        with eval_mode(model):
            sums = sum_logps_by_row(model(batch["idx"], labels=batch["labels"]), batch["labels"])
        logps[torch.as_tensor(rows, device=fabric.device)] = sums.view(2, -1).T
    return fabric.all_reduce(logps, reduce_op="sum").cpu()


def cached_reference(
    data: DPOData,
    fabric: Fabric,
    model: torch.nn.Module,
    batches: list[np.ndarray],
    name: str,
    key: dict[str, str],
    cache_dir: Path,
) -> torch.Tensor:
    """`compute_reference`, kept in a file of `cache_dir` that is named after the hash of `key`."""
    text = json.dumps(key, sort_keys=True)
    path = Path(cache_dir) / f"reference-{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    logps = None
    if fabric.global_rank == 0 and path.is_file():
        try:
            logps = read_state(path).get("logps")
        except UserError:
            log(f"{path} is damaged: computing it again.")
    logps = fabric.broadcast(logps)
    if logps is not None and logps.shape == (len(data), 2):
        return logps
    logps = compute_reference(data, fabric, model, batches, name)
    if fabric.global_rank == 0:
        try:
            with atomic_write(path) as temporary:
                save_file({"logps": logps.contiguous()}, temporary, metadata={"key": text})
        except UserError as error:
            log(f"note: the reference is not cached. {error}")
    return logps


def check_policy_equals_reference(
    data: DPOData, fabric: Fabric, model: torch.nn.Module, batches: list[np.ndarray]
) -> None:
    """Before the first step the policy is the reference: the loss is ln 2 (or what it is at h = 0), all margins 0.

    Raises:
        UserError: it is not, by more than 1e-5.
    """
    if data.loss["reference_free"]:
        return
    for rows in batches:
        batch = fabric.to_device(data.batch(rows))
        with fabric.no_backward_sync(model), eval_mode(model):  # with gradients, as in training
            policy, reference = (logps.detach() for logps in data.logps(model, batch))
        chosen, rejected = (policy - reference).chunk(2)
        margin = data.loss["beta"] * (chosen - rejected).abs().max().item()
        loss = dpo_loss(*policy.chunk(2), *reference.chunk(2), **data.loss)[0].mean().item()
        if not margin <= 1e-5 or not abs(loss - data.loss_at_start) <= 1e-5:
            raise UserError(
                f"Before the first step the loss is {loss:.6f} and a margin {margin:.1e} where they must be "
                f"{data.loss_at_start:.6f} and 0: policy and reference, which are the same weights, round differently "
                "on this device; use --precompute_reference false, or --precision 32-true."
            )


@torch.no_grad()
def sampled_kl(
    model: LLaMA,
    reference_state: dict[str, torch.Tensor],
    prompts: list[list[int]],
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
) -> dict[str, float]:
    """How far sampled answers have moved from what the reference would say.

    Args:
        model: the policy, not wrapped.
        prompts: one answer to each is drawn at temperature 1.

    Returns:
        kl: the estimate Σ (log π - log π_ref) / answers, in nats per answer; degenerate: the share of answers that
        are empty, do not end within `max_new_tokens`, or mostly repeat themselves.
    """
    answers = generate(model, prompts, Sampling(max_new_tokens, temperature=1.0), stop_ids)
    kl, degenerate = 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ended = len(answer) < min(max_new_tokens, remaining_context(model, prompt))
        ids = torch.tensor([prompt + answer + [stop_ids[0]] * ended], device=model.transformer.wte.weight.device)
        labels = ids.clone()
        labels[:, : len(prompt)] = IGNORE_INDEX
        with eval_mode(model):
            policy = model(ids, labels=labels).sum()
            with swapped_parameters(model, reference_state):
                kl += (policy - model(ids, labels=labels).sum()).item() / len(prompts)
        fours = list(zip(*(answer[i:] for i in range(4)), strict=False))
        degenerate += not answer or not ended or 2 * len(set(fours)) < len(fours)
    return {"kl": kl, "degenerate": degenerate / len(prompts)}
