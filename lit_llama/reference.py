"""The reference of DPO: a frozen copy of the adapter that training starts from, on the same base.

Its log-probabilities are either computed once before training and cached (`stored_reference`), or computed in each step
by one more forward pass (`adapter_reference`).
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from lightning.fabric import Fabric
from safetensors.torch import save_file
from tqdm import tqdm

from lit_llama.checkpoint import CONFIG_NAME, weights_path
from lit_llama.data import IGNORE_INDEX, PreferenceData
from lit_llama.device import device_name
from lit_llama.dpo import DPOLoss, Reference, dpo_loss, pair_logps
from lit_llama.generation import Sampling, generate, remaining_context
from lit_llama.model import LLaMA
from lit_llama.modules import eval_mode, swapped_parameters
from lit_llama.sharding import in_step
from lit_llama.storage.cache import cache_folder, cache_path, fill_once, hash_file, is_intact
from lit_llama.storage.tensor_files import read_state
from lit_llama.utils import UserError, log

NOT_FINITE = (
    "are not finite (NaN or infinity): check the base, the initial adapter and the data; with --quantize int8, use a "
    "4-bit mode such as nf4."
)


def stored_reference(logps: torch.Tensor) -> Reference:
    """Return the reference whose log-probabilities were computed before training.

    Args:
        logps: (rows, 2) of the chosen and the rejected response of each row of a split.
    """
    return lambda model, batch: logps[batch["rows"]].T.flatten()


def adapter_reference(state: dict[str, torch.Tensor]) -> Reference:
    """Return the reference that computes the log-probabilities of each batch, with other adapter weights.

    Args:
        state: The adapter weights.
    """

    def reference(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad(), eval_mode(model), swapped_parameters(model, state):
            return pair_logps(model, batch)

    return reference


def adapter_sha256(state: dict[str, torch.Tensor]) -> str:
    """Return a hash of adapter weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def base_sha256(checkpoint_dir: Path) -> str:
    """Return a hash of a base model's weight file, which is read completely, and its configuration."""
    path = weights_path(checkpoint_dir)
    if path.stat().st_size > 1 << 30:  # takes seconds to minutes
        log(f"Hashing {path}.")
    digest = hash_file(path)
    digest.update((Path(checkpoint_dir) / CONFIG_NAME).read_bytes())
    return digest.hexdigest()


def reference_key(
    data: PreferenceData,
    base: str,
    adapter: str,
    batches: list[np.ndarray],
    fabric: Fabric,
    quantize: str | None = None,
    method: str = "aligner",
    compiled: bool = False,
) -> dict[str, str]:
    """Return everything that the log-probabilities of the reference depend on, including their rounding.

    Args:
        base: `base_sha256` of the base.
        adapter: `adapter_sha256` of the reference, or "none".
        batches: The micro-batches in which they are computed.
        quantize: The quantization of the base.
        method: The finetuning method; its own layers are not quantized.
        compiled: Whether the layers are compiled.
    """
    layout = hashlib.sha256(b"".join(np.asarray([len(b), *data.shape(b), *b], np.int64).tobytes() for b in batches))
    on_gpu = fabric.device.type == "cuda"
    on_cpu = f" {instruction_set()} {torch.get_num_threads()} threads"
    processor = device_name(fabric.device) if on_gpu else on_cpu
    return {
        "data": data.sha256,
        "tokenizer": data.meta.get("tokenizer_sha256"),
        "base": base,
        "adapter": adapter,
        "batches": layout.hexdigest(),
        "precision": str(fabric.strategy.precision.precision),
        "method": method,
        "quantize": str(quantize),
        "compiled": str(compiled),
        "device": fabric.device.type + processor,
        "torch": torch.__version__,
    }


def instruction_set() -> str:
    """Identify the instructions that PyTorch uses and those that the CPU has; rounding depends on them."""
    flags = ""
    with suppress(OSError):  # Linux only
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{torch.backends.cpu.get_cpu_capability()} {hashlib.sha256(flags.encode()).hexdigest()[:16]}"


@torch.no_grad()
def compute_reference(
    data: PreferenceData, fabric: Fabric, model: torch.nn.Module, batches: list[np.ndarray], name: str
) -> torch.Tensor:
    """Return the log-probabilities of the chosen and the rejected responses under the model, (rows, 2) fp32.

    They are computed in the micro-batches of training, so that bf16 rounds them as it rounds those of the policy. The
    work is divided among all processes.
    """
    logps = torch.zeros(len(data), 2, device=fabric.device)
    mine = batches[fabric.global_rank :: fabric.world_size]
    with eval_mode(model), in_step(model):
        for rows in tqdm(mine, desc=f"Reference, {name}", unit="batch", disable=fabric.global_rank > 0):
            batch = fabric.to_device(data.batch(rows))
            logps[batch["rows"]] = pair_logps(model, batch).view(2, -1).T
    return fabric.all_reduce(logps, reduce_op="sum").cpu()


def cached_reference(
    data: PreferenceData,
    fabric: Fabric,
    model: torch.nn.Module,
    batches: list[np.ndarray],
    name: str,
    key: dict[str, str],
    data_dir: Path,
) -> torch.Tensor:
    """Return the result of `compute_reference`.

    It is cached next to the dataset folder, in a folder named after the hash of `key`, if that can be written.

    Raises:
        UserError: A log-probability is not finite; nothing is cached.
    """
    text = json.dumps(key, sort_keys=True)
    folder = cache_path(data_dir) / f"reference-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    logps = None
    if fabric.global_rank == 0 and is_intact(folder):
        logps = read_state(folder / "logps.safetensors").get("logps")
    logps = fabric.broadcast(logps)
    if logps is not None and logps.shape == (len(data), 2) and logps.isfinite().all():
        return logps
    logps = compute_reference(data, fabric, model, batches, name)
    if not logps.isfinite().all():
        raise UserError(f"Log-probabilities of the reference ({name} rows) {NOT_FINITE}")
    if fabric.global_rank == 0:
        try:
            cache_folder(data_dir)
            tensors = {"logps": logps.contiguous()}
            fill_once(folder, lambda new: save_file(tensors, new / "logps.safetensors", metadata={"key": text}))
        except UserError as error:
            reason = str(error).partition(";")[0]  # without the advice on output folders
            log(f"note: the reference is not cached, and the next run computes it again. {reason}.")
    return logps


def check_policy_equals_reference(
    loss: DPOLoss, data: PreferenceData, fabric: Fabric, model: torch.nn.Module, batches: list[np.ndarray]
) -> None:
    """Check that training starts from the reference: all margins are 0, and the loss is ln 2 (or that of another type).

    Raises:
        UserError: A margin or the loss is off by more than 1e-5 (relative to the loss if it should be above 1), or a
            log-probability is not finite.
    """
    if loss.reference is None:
        return
    for rows in batches:
        batch = fabric.to_device(data.batch(rows))
        with fabric.no_backward_sync(model), eval_mode(model):  # with gradients, as in training
            policy, reference = (logps.detach() for logps in loss.logps(model, batch))
        if not (policy + reference).isfinite().all():
            raise UserError(f"Before the first step, log-probabilities of the policy or the reference {NOT_FINITE}")
        chosen, rejected = (policy - reference).chunk(2)
        margin = loss.beta * (chosen - rejected).abs().max().item()
        value = dpo_loss(*policy.chunk(2), *reference.chunk(2), **loss.settings)[0].mean().item()
        if not margin <= 1e-5 or not abs(value - loss.loss_at_start) <= 1e-5 * max(1.0, loss.loss_at_start):
            raise UserError(
                f"Before the first step the loss is {value:.6f} and a margin {margin:.1e}, but they must be "
                f"{loss.loss_at_start:.6f} and 0: policy and reference have the same weights but are rounded "
                "differently on this device. Use --compile false or --precision 32-true; if the reference was computed "
                "on another machine, use --precompute_reference false."
            )


@torch.no_grad()
def sampled_kl(
    model: LLaMA,
    reference_state: dict[str, torch.Tensor],
    prompts: list[list[int]],
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
    batch_size: int,
) -> dict[str, float]:
    """Sample one answer of the policy to each prompt at temperature 1 and compare it with the reference.

    Args:
        model: The policy, not wrapped by Fabric.
        reference_state: Adapter weights of the reference.
        prompts: Token ids.
        batch_size: Number of prompts that are answered at once; it changes the answers only by rounding, on a GPU.

    Returns:
        kl: The estimate Σ (log π - log π_ref) / answers of the KL divergence, in nats per answer.
        degenerate: The share of answers that are empty, do not end within `max_new_tokens`, or mostly repeat
            themselves.
    """
    stop_ids = tuple(i for i in stop_ids if i < model.config.padded_vocab_size)  # a tokenizer may have more
    sampling, answers = Sampling(max_new_tokens, temperature=1.0), []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        answers += generate(model, batch, sampling, stop_ids, rows=list(range(start, start + len(batch))))
    kl, degenerate = 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ended = len(answer) < min(max_new_tokens, remaining_context(model, prompt))
        endings = [[stop_id] for stop_id in stop_ids] if ended else [[]]
        ids = torch.tensor([prompt + answer + end for end in endings], device=model.transformer.wte.weight.device)
        with eval_mode(model):
            policy = answer_logp(model, ids, len(prompt))
            with swapped_parameters(model, reference_state):
                kl += (policy - answer_logp(model, ids, len(prompt))).item() / len(prompts)
        fours = list(zip(*(answer[i:] for i in range(4)), strict=False))
        degenerate += not answer or not ended or 2 * len(set(fours)) < len(fours)
    return {"kl": kl, "degenerate": degenerate / len(prompts)}


def answer_logp(model: LLaMA, ids: torch.Tensor, n_prompt: int) -> torch.Tensor:
    """Return the log-probability of an answer, summed over the stop tokens that may end it: () fp32, in nats.

    Args:
        ids: (endings, T) the prompt of `n_prompt` tokens, the answer, and one of the stop tokens.
    """
    labels = ids.clone()
    labels[:, :n_prompt] = IGNORE_INDEX
    return model.label_logps(ids, labels).view(len(ids), ids.size(1) - n_prompt).sum(1).logsumexp(0)
