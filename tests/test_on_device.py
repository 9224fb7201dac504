"""Computations stay on their device and never wait for it: checked on the meta device, which has shapes but no data.

On this device, reading a value fails, and a tensor left on the CPU is detected. On a GPU, either would be an error,
or a copy that blocks the program until all earlier work is done.
"""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lit_llama import generation
from lit_llama.bank import Bank
from lit_llama.checkpoint import AdapterFile
from lit_llama.compose import LLaMA as Composed
from lit_llama.dpo import DPOLoss
from lit_llama.generation import Sampling, decode, decode_one_token, prefill, sample
from lit_llama.kv_cache import KVCache
from lit_llama.logps import LabelLogps, find_labels
from lit_llama.methods import METHODS
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.packing import pack_answers
from lit_llama.rl import PolicyLoss
from lit_llama.train import SFTLoss

META = torch.device("meta")
# operators that synchronize: they return a number, or a tensor whose shape depends on values
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "bincount")


class OnDevice(TorchDispatchMode):
    """Fails if an operator takes or returns a tensor on another device, or has to wait for values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not name.startswith(WAITING), f"{name} waits for the device"
        inputs, _ = tree_flatten((args, kwargs or {}))
        masks = [t for t in inputs if isinstance(t, torch.Tensor) and t.dtype == torch.bool]
        assert not (name.startswith("index") and masks), f"{name} with a mask waits for the device"
        out = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, [*inputs, *tree_flatten(out)[0]]):
            # PyTorch itself passes scalars as CPU tensors
            assert tensor.is_meta or tensor.dim() == 0, f"{name} has a tensor of shape {tuple(tensor.shape)} on the CPU"
        return out


def variant(method: str | None, n: int) -> LLaMA:
    cls = LLaMA if method is None else METHODS[method]
    names = [name for name in ("adapter_prompt_length", "prompt_length") if hasattr(cls.config_class, name)]
    network = cls(cls.config_class(**{**toys.SIZES, "n_kv_head": 2}, **dict.fromkeys(names, n)))
    toys.randomize(network)
    return network


def composed(rows: int | None) -> Composed:
    """Return a model with a bank on its device: its `rows` have different adapters, or all share one sum if None."""
    network = Composed(LLaMAConfig(**{**toys.SIZES, "n_kv_head": 2}))
    toys.randomize(network)
    network.bank = Bank(network.config, start_layer=1)
    for n in (1, 3):
        state = toys.adapter_state(toys.aligned(n, seed=n, n_kv_head=2))
        meta = {"method": "aligner", "config": {"adapter_prompt_length": n, "adapter_start_layer": 1}}
        network.bank.add(str(n), AdapterFile(state, meta, Path("toy")))
    sums = [(("1", 1.0), ("3", 0.5)), (), (("3", 1.0),)]
    network.use(sums[:rows] if rows else sums[:1])
    network.to(META)
    for block in network.transformer.h:
        block.attn.terms = [type(t)(*(x if x is None else x.to(META) for x in t)) for t in block.attn.terms]
    return network


VARIANTS = [(None, 1), *((method, n) for method in METHODS for n in (1, 3))]
MODELS: dict[str, Callable[[], LLaMA]] = {
    f"{method or 'base'}, N = {n}": lambda method=method, n=n: variant(method, n) for method, n in VARIANTS
} | {"bank, one sum": lambda: composed(None), "bank, rows differ": lambda: composed(3)}
each_model = pytest.mark.parametrize("kind", MODELS)


def sft_batch() -> dict[str, torch.Tensor]:
    idx, labels = toys.token_ids(2, 9), toys.token_ids(2, 9, seed=1)
    labels[0, :4], labels[1, 7:] = -1, -1
    return {"idx": idx, "labels": labels, "label_index": find_labels(labels)}


def policy_batch() -> dict[str, torch.Tensor]:
    batch = pack_answers([([1, 2, 3], [[4, 5], [6], [7, 8]]), ([9], [[4], [5, 6]])])
    n_labels = len(batch["label_index"])
    return batch | {name: torch.ones(n_labels) for name in ("advantages", "weights", "mean_weights")}


def pair_batch() -> dict[str, torch.Tensor]:
    return pack_answers([([1, 2, 3], [[4, 5], [6]])])


def reference(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.zeros(2, device=batch["idx"].device)


LOSSES = {
    "sft": (SFTLoss(), sft_batch),
    "dpo": (DPOLoss(reference, sft_weight=0.5), sft_batch),
    "dpo, packed": (DPOLoss(reference, sft_weight=0.5), pair_batch),
    "rl": (PolicyLoss(clip=0.2, kl_weight=0.0, start={}), policy_batch),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", [kind for kind in MODELS if "rows differ" not in kind])
def test_forward_and_backward_pass(kind, loss):
    network, (compute, make) = MODELS[kind]().to(META).requires_grad_(), LOSSES[loss]
    for frozen in (False, True):
        if frozen and network.adapter_parameters():
            for name, p in network.named_parameters():
                p.requires_grad_(network.is_adapter_parameter(name))
        batch = {name: t.to(META) for name, t in make().items()}
        with OnDevice():
            compute(LabelLogps(network), batch)["loss"].backward()
        assert all((p.grad is not None) == p.requires_grad for p in network.parameters())
        network.zero_grad()


@pytest.mark.parametrize("lengths", [(7, 7, 7), (3, 7, 5)], ids=["even", "uneven"])
@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
@each_model
@torch.inference_mode()
def test_decoding_step(kind, static, lengths):
    network = MODELS[kind]().to(META).eval()
    cache = KVCache(network.config, 3, 20, META, torch.float32, static=static)
    with network.inference():
        assert prefill(network, toys.prompts(*lengths), cache).shape == (3, 50)
        tokens, positions = torch.zeros(3, dtype=torch.long, device=META), torch.tensor(lengths, device=META)
        with OnDevice():
            for _ in range(2):
                logits = decode_one_token(network, tokens, positions, cache)
                for sampling in (Sampling(), Sampling(temperature=0.7, top_k=4, top_p=0.9)):
                    tokens = sample(logits, sampling, [None] * 3)
                positions = positions + 1
    assert logits.device == META and tokens.shape == (3,)


# without rows of a bank in several groups: selecting them waits for the device, see below
GROUPED = [(kind, n) for kind in MODELS for n in (generation.GROUP_TOKENS, 1) if (kind, n) != ("bank, rows differ", 1)]


@pytest.mark.parametrize(("kind", "group_tokens"), GROUPED)
def test_a_prefill_of_repeated_prompts(kind, group_tokens, monkeypatch):
    monkeypatch.setattr(generation, "GROUP_TOKENS", group_tokens)  # 1: a prefill for each length
    network, (short, long) = MODELS[kind]().to(META).eval(), toys.prompts(3, 9)
    cache = KVCache(network.config, 3, 20, META, torch.float32)
    with network.inference():
        assert prefill(network, [short, long, short], cache).shape == (3, 50)
    assert cache.k.device == META


@each_model
def test_complete_generation(kind, monkeypatch):
    monkeypatch.setattr(Sampling, "generators", lambda self, rows, device: [None for _ in rows])  # this device has none
    for sampling in (Sampling(4), Sampling(4, temperature=0.5, top_k=3)):
        steps = list(decode(MODELS[kind]().to(META), toys.prompts(3, 7, 5), sampling))
        assert len(steps) == 4 and all(tokens.device == META for tokens in steps)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x + torch.ones(3),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: torch.arange(3),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.isfinite().all()),
    ],
)
def test_violations_are_detected(mistake):
    with OnDevice(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        mistake(torch.ones(3, device=META))


# == functions that wait for the device, and why ==

CALLS = {"item", "tolist", "nonzero", "masked_select", "unique", "equal", "cpu", "find_labels", "synchronize"}
WAITS = {
    # in training
    "logps.py: find_labels": "the number of labels; batches are made with it on the CPU",
    "data.py: pad_rows": "on the CPU",
    "packing.py: pack_answers": "the same",
    "model.py: LLaMA.label_logps": "without label_index, as in a caller's own loss",
    "dpo.py: sum_logps_by_row": "the same",
    "dpo.py: DPOLoss.__init__": "once per run",
    "steps.py: read_metrics": "the metrics of `log_interval` steps",
    "steps.py: Step.problem": "the rows whose loss is not finite, when training ends for it",
    "steps.py: mean_over_processes": "the losses of a validation",
    "reference.py: check_policy_equals_reference": "once per run",
    "reference.py: compute_reference": "once per run",
    "reference.py: adapter_sha256": "once per run",
    "reference.py: sampled_kl": "a metric of a validation",
    "rollouts.py: Answerer.answers": "rewards are computed by the caller's program from texts",
    "rollouts.py: Answerer.rewards": "the same",
    "sharding.py: in_step.anyone_runs": "whether another process still makes a forward pass, without gradients",
    # in generation
    "generation.py: read": "tokens become text; one step behind on a GPU",
    "generation.py: finished_copy": "the same",
    "compose.py: LLaMA.selecting.select": "for each group of prompts, and when half of the rows have ended; "
    "once per prefix length, not in each layer",
    "engine.py: Engine._take_terms": "when requests join the batch",
    "engine.py: Engine._append": "every client gets its token at once",
    "jobs.py: Row._logps": "log-probabilities, where a client asks for them",
    # not on a device
    "model.py: LLaMA.normalize_state_dict": "when weights are loaded",
    "variant.py: without_aliases": "when weights are loaded",
    "data.py: SFTData.prompts": "on the CPU",
    "data.py: PreferenceData.batch": "on the CPU",
    "data.py: PreferenceData.prompts": "on the CPU",
    "data.py: PromptData.prompt_ids": "on the CPU",
    "rollouts.py: Rollouts.sample": "rewards are on the CPU",
}
FILES = {line.partition(":")[0] for line in WAITS} | {
    "aligner.py", "adapter.py", "adapter_v2.py", "bitfit.py", "compiled.py", "kv_cache.py", "lora.py", "merge.py",
    "prompt_tuning.py", "rl.py", "rope.py", "sampling.py", "train.py",
}  # fmt: skip


def waiting_calls(path: Path) -> set[str]:
    """Return "FILE: FUNCTION" for every function that calls a method which would wait for a GPU."""

    def visit(node: ast.AST, scope: str) -> set[str]:
        functions = set()
        for child in ast.iter_child_nodes(node):
            inner = scope
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{scope}.{child.name}".lstrip(".")
            if isinstance(child, ast.Call):
                name = getattr(child.func, "attr", getattr(child.func, "id", ""))
                functions |= {f"{path.name}: {scope}"} if name in CALLS else set()
            functions |= visit(child, inner)
        return functions

    return visit(ast.parse(path.read_text(encoding="utf-8")), "")


def test_every_function_that_waits_for_the_device_is_listed():
    root = Path(__file__).parent.parent
    paths = [path for package in ("lit_llama", "generate") for path in (root / package).rglob("*.py")]
    assert {call for path in paths if path.name in FILES for call in waiting_calls(path)} == WAITS.keys()
