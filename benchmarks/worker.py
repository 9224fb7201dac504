"""The contestants of the benchmarks: this project's model and the peers', which load, train and generate.

Each runs in its own process (`benchmarks.harness.Contestant`).
"""

import importlib
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.material import START, random_adapter
from benchmarks.measure import Memory, now, timed
from lit_llama import aligner
from lit_llama.checkpoint import CONFIG_NAME, load_model
from lit_llama.compose import load_adapted
from lit_llama.data import IGNORE_INDEX, PreferenceData, SFTData
from lit_llama.device import disable_cudnn_attention
from lit_llama.dpo import dpo_loss, sum_logps_by_row
from lit_llama.generation import Sampling, decode, generate
from lit_llama.logps import find_labels
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.onednn import PackedLinear, pack_
from lit_llama.packing import pack_answers

Batch = dict[str, torch.Tensor]


class Worker:
    """Serves calls about one model: `load`, `step`, `generate`.

    A subclass for each library has `load_model`, which sets `model`, `loss` and `generate_tokens`.
    """

    imports: tuple[str, ...] = ()  # modules that loading needs; importing them is not measured

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        self.settings, self.weights, self.device = settings, settings["weights"], settings["device"]
        self.dtype, clock = settings["dtype"], settings.get("clock", "wall")
        self.now, self.timed = partial(now, self.device, clock), partial(timed, device=self.device, clock=clock)
        self.data: dict[str, SFTData | PreferenceData] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        for name in self.imports:
            importlib.import_module(name)

    def load(self) -> dict[str, Any]:
        """Load the model; memory is counted from here on."""
        self.memory = Memory(self.device)
        return {"seconds": self.timed(self.load_model)}

    def step(self, batches: list[Any], data: str = "sft", loss: str = "sft") -> dict[str, Any]:
        """Take an optimizer step, on a GPU after one with the last micro-batch alone that is not measured.

        Args:
            batches: micro-batches, the longest one last; rows of the data, or (rows, length, length of the responses)
                of random tokens.
            data: "sft", "pairs" or "random", or "random, packed", where two responses share a prompt and a sequence.
            loss: "sft", "dpo" (with known reference log-probabilities) or "dpo, two models".

        Returns:
            seconds: of each part of the step; loss: mean over the micro-batches; lengths: of all sequences; padding:
            share of padding among all tokens; peak: peak bytes of memory; beyond: peak minus the frozen weights.
        """
        self.memory.reset_peak()
        if self.device.type == "cuda":
            self._step(batches[-1:], data, loss)  # allocates memory for the longest
        answer = self._step(batches, data, loss)
        peak, frozen = self.memory.peak(), sum(p.nbytes for p in self.model.parameters() if not p.requires_grad)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # other contestants need the memory
        return {**answer, "peak": peak, "beyond": peak - frozen}

    def _step(self, micro_batches: list[Any], data: str, loss: str) -> dict[str, Any]:
        seconds, losses = dict.fromkeys(("data", "forward", "backward", "optimizer"), 0.0), []
        self.model.train()

        def part(name: str, work: Callable[[], Any]) -> Any:
            began = self.now()
            result = work()
            seconds[name] += self.now() - began
            return result

        batches = [part("data", partial(self._batch, rows, data)) for rows in micro_batches]
        for batch in batches:
            mean = part("forward", partial(self.loss, batch, loss))
            part("backward", (mean / len(batches)).backward)
            losses.append(mean.item())
        part("optimizer", self._update)
        lengths = torch.cat([batch["lengths"] for batch in batches]).cpu().numpy()
        padding = 1 - lengths.sum() / sum(batch["idx"].numel() for batch in batches)
        return {"seconds": seconds, "loss": float(np.mean(losses)), "lengths": lengths, "padding": padding}

    def _batch(self, rows: Any, data: str) -> Batch:
        if data.startswith("random"):
            count, length, response = rows
            idx = torch.randint(3, self.model.config.vocab_size, (count, length), device=self.device)
            prompt = torch.arange(length, device=self.device) < length - response
            labels, lengths = idx.masked_fill(prompt, IGNORE_INDEX), torch.full((count,), length)
            if data == "random, packed":
                texts = [(ids[:-response], ids[-response:]) for ids in idx.tolist()]
                pairs = zip(texts[: count // 2], texts[count // 2 :], strict=True)
                packed = pack_answers([(prompt, [first, second]) for (prompt, first), (_, second) in pairs])
                return {name: tensor.to(self.device) for name, tensor in packed.items()} | {"lengths": lengths}
            return {"idx": idx, "labels": labels, "label_index": find_labels(labels), "lengths": lengths}
        if data not in self.data:
            self.data[data] = (SFTData if data == "sft" else PreferenceData)(self.settings["data"] / data, "train")
        source = self.data[data]
        batch = {name: tensor.to(self.device) for name, tensor in source.batch(rows).items()}
        sequences = len(batch["idx"]) // len(rows)  # a pair has two, equally long
        return {**batch, "lengths": torch.as_tensor(source.lengths[rows], device=self.device).repeat(sequences)}

    def _update(self) -> None:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        if trainable:
            self.optimizer = self.optimizer or torch.optim.AdamW(trainable, lr=1e-3)
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def generate(self, prompts: list[list[int]], n_new: int) -> dict[str, Any]:
        """Generate `n_new` tokens for each prompt.

        Returns:
            prefill: seconds to the first token; decode: seconds from there to the last one; steady: seconds of a token
            from the third on, None for fewer, which leaves out the recording of a CUDA graph; peak: peak bytes since
            loading.
        """
        count, times = 0, [self.now()]

        def on_token() -> None:
            nonlocal count
            count += 1
            if count in (1, 2, n_new):
                times.append(self.now())

        with torch.no_grad():
            self.generate_tokens(prompts, n_new, on_token)
        assert count == n_new, f"{count} tokens instead of {n_new}"
        decode, steady = times[-1] - times[1], (times[-1] - times[2]) / (n_new - 2) if n_new > 2 else None
        return {"prefill": times[1] - times[0], "decode": decode, "steady": steady, "peak": self.memory.peak()}


class Ours(Worker):
    """This project's model with an Aligner of `n` prefix tokens; n = 0 is the bare base.

    The bare base is the limit of training speed: its backward pass reaches down to where the first aligned layer would
    add its term, but nothing is added.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        disable_cudnn_attention()

    def load(self) -> dict[str, Any]:
        """Load the model; the result also says whether its weights are packed, if that measured faster (`pack_`)."""
        loaded = super().load()
        return {**loaded, "packed": any(isinstance(module, PackedLinear) for module in self.model.modules())}

    def load_model(self) -> None:
        n, options = self.settings["n"], {"device": self.device, "dtype": self.dtype}
        if not n:
            model = self._load_base()
        elif self.settings.get("generates"):  # as the generate scripts do
            adapter = random_adapter(LLaMAConfig.from_json(self.weights / CONFIG_NAME), n)
            model = load_adapted(self.weights, [adapter], **options)
        else:
            model = load_model(self.weights, method="aligner", method_config=_aligned(n), **options)
        if self.settings.get("generates"):
            self.model = pack_(model)
        else:
            self._train(model)

    def _load_base(self) -> LLaMA:
        return load_model(self.weights, device=self.device, dtype=self.dtype)

    def build(self, n: int, config: dict[str, Any]) -> dict[str, Any]:
        """Make a model of any shape with random weights, on the device and in the dtype of the base."""
        self.memory, self.optimizer = Memory(self.device), None
        torch.manual_seed(0)
        with torch.device("meta"):
            model = aligner.LLaMA(aligner.LLaMAConfig(**config, **_aligned(n))) if n else LLaMA(LLaMAConfig(**config))
        adapter = model.adapter_parameters() if n else {}
        base = {}
        for name, p in model.named_parameters():
            if name not in adapter:
                mean = 1.0 if name.endswith("scale") else 0.0
                base[name] = torch.empty(p.shape, device=self.device, dtype=self.dtype).normal_(mean, 0.02)
        model.load_state_dict(base, assign=True)
        if adapter:
            model.initialize_adapter()
        model.to(self.device)
        if self.settings.get("generates"):
            self.model = pack_(model.requires_grad_(False))
        else:
            self._train(model)
        return {}

    def _train(self, model: LLaMA) -> None:
        self.model = model
        model.gradient_checkpointing = self.settings.get("checkpointing", False)
        aligner.mark_only_adapter_as_trainable(model)
        for name, p in model.named_parameters():
            if name.endswith("gating_factor"):  # random gates, so that no shortcut for zero gates is measured
                torch.nn.init.normal_(p, std=0.1)
        if not any(p.requires_grad for p in model.parameters()):
            model.transformer.h[START].attn.c_proj.register_forward_pre_hook(
                lambda module, args: args[0].detach().requires_grad_() if torch.is_grad_enabled() else None
            )

    def loss(self, batch: Batch, kind: str) -> torch.Tensor:
        labels, index, segments = batch["labels"], batch["label_index"], batch.get("segments")
        logps = self.model.label_logps(batch["idx"], labels, index, segments)
        if kind == "sft":
            return -logps.mean()
        policy = sum_logps_by_row(logps, labels, index, segments)
        reference = torch.full_like(policy, -100.0)  # as if read from the cache
        if kind == "dpo, two models":
            if not hasattr(self, "reference"):
                self.reference = self._load_base()
            with torch.no_grad():
                logps = self.reference.label_logps(batch["idx"], labels, index, segments)
                reference = sum_logps_by_row(logps, labels, index, segments)
        return dpo_loss(*policy.chunk(2), *reference.chunk(2))[0].mean()

    def generate_tokens(self, prompts: list[list[int]], n_new: int, on_token: Callable[[], None]) -> None:
        for _ in decode(self.model, prompts, Sampling(n_new)):  # `read` would yield a token one step later on a GPU
            on_token()

    def answer_all(self, prompts: list[list[int]], n_new: int, batch_size: int) -> dict[str, Any]:
        """Return the seconds for all prompts, `batch_size` at a time."""

        def work() -> None:
            for i in range(0, len(prompts), batch_size):
                generate(self.model, prompts[i : i + batch_size], Sampling(n_new))

        return {"seconds": self.timed(work)}


def _aligned(n: int) -> dict[str, int]:
    return {"adapter_prompt_length": n, "adapter_start_layer": START}


def _peer_labels(batch: Batch) -> torch.Tensor:
    """Return the labels with -100, as the peers' losses expect, where nothing is predicted."""
    return batch["labels"].masked_fill(batch["labels"] == IGNORE_INDEX, -100)


class Transformers(Worker):
    """transformers' LLaMA, alone or with PEFT's "lora" or "adaption_prompt"."""

    imports = ("transformers", "peft")

    def load_model(self) -> None:
        import peft
        import transformers

        transformers.logging.set_verbosity_error()
        model = transformers.AutoModelForCausalLM.from_pretrained(self.weights / "hf", dtype=self.dtype)
        self.model = model.to(self.device)
        layers = model.config.num_hidden_layers - START
        if self.settings["method"] == "lora":
            self.model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))
        elif self.settings["method"] == "adaption_prompt":
            config = peft.AdaptionPromptConfig(adapter_len=10, adapter_layers=layers, task_type="CAUSAL_LM")
            self.model = peft.get_peft_model(model, config)

    def loss(self, batch: Batch, kind: str) -> torch.Tensor:
        idx, lengths = batch["idx"], batch["lengths"].unsqueeze(1)
        mask = (torch.arange(idx.size(1), device=idx.device) < lengths).long()
        return self.model(input_ids=idx, attention_mask=mask, labels=_peer_labels(batch)).loss

    def generate_tokens(self, prompts: list[list[int]], n_new: int, on_token: Callable[[], None]) -> None:
        idx = torch.tensor(prompts, device=self.device)

        def never_stop(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            on_token()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        self.model.eval().generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=n_new, do_sample=False, eos_token_id=None,
            pad_token_id=0, cache_implementation="static", stopping_criteria=[never_stop],
        )  # fmt: skip


class LitGPT(Worker):
    """LitGPT's model, alone or with its "adapter" in the default settings (10 tokens per layer, from layer 2)."""

    imports = ("litgpt.adapter", "litgpt.generate.base", "litgpt.scripts.convert_hf_checkpoint", "litgpt.utils")

    def load_model(self) -> None:
        from litgpt import adapter
        from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
        from safetensors.torch import load_file

        ours = LLaMAConfig.from_json(self.weights / CONFIG_NAME)
        same = ("block_size", "vocab_size", "padded_vocab_size", "n_layer", "n_head", "n_embd", "head_size",
                "intermediate_size", "norm_eps")  # fmt: skip
        config = adapter.Config.from_name(
            "Llama-2-7b-hf",
            **{name: getattr(ours, name) for name in same},
            n_query_groups=ours.n_kv_head,
            rope_base=int(ours.rope_base),
            adapter_start_layer=START if self.settings["method"] else ours.n_layer,
        )
        state: dict[str, torch.Tensor] = {}
        copy_weights_hf_llama(config, {}, state, load_file(self.weights / "hf" / "model.safetensors"), dtype=self.dtype)
        with torch.device("meta"):
            model = adapter.GPT(config)
        model.load_state_dict(state, strict=False, assign=True)
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                if p.is_meta:  # the adapter's
                    setattr(module, name, torch.nn.Parameter(0.1 * torch.randn(p.shape)))
        model.cos, model.sin = model.rope_cache(self.device)
        self.model = model.to(self.device, self.dtype)
        adapter.mark_only_adapter_as_trainable(self.model)

    def loss(self, batch: Batch, kind: str) -> torch.Tensor:
        from litgpt.utils import chunked_cross_entropy

        for block in self.model.transformer.h:
            block.attn.adapter_kv_cache = None  # a cache kept from an earlier step breaks the second backward pass
        logits = self.model(batch["idx"], lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        return chunked_cross_entropy(logits, _peer_labels(batch)[..., 1:])

    def generate_tokens(self, prompts: list[list[int]], n_new: int, on_token: Callable[[], None]) -> None:
        from litgpt.generate.base import batched_generate_fn, generate_fn

        self.model.eval()
        idx = torch.tensor(prompts, device=self.device)
        length = self.model.max_seq_length = idx.size(1) + n_new
        self.model.set_kv_cache(len(idx), device=self.device, dtype=self.dtype)
        common = dict(include_prompt=False, include_eos=False)
        if len(prompts) == 1:
            steps = generate_fn(self.model, idx[0], length, temperature=0.0, **common)
        else:
            steps = batched_generate_fn(self.model, idx, length, sample_args={"temperature": 0.0}, **common)
        for _ in steps:
            on_token()


WORKERS: dict[str, type[Worker]] = {"ours": Ours, "transformers": Transformers, "litgpt": LitGPT}
_workers: list[Worker] = []  # of this process: at most one


def call(settings: dict[str, Any], method: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Call a method of this process's worker, which the first call creates.

    Args:
        settings: settings of the worker; `path` is the folder of the peers' packages.
    """
    if not _workers:
        os.dup2(2, 1)  # output of libraries goes to stderr
        sys.path.append(str(settings.get("path", "")))
        _workers.append(WORKERS[settings["kind"]](settings))
    return getattr(_workers[0], method)(**arguments)
