"""One contestant of a benchmark, in a process of its own: reads calls from stdin, answers each with one line of JSON.

Started by `benchmarks.harness.Contestant`; the peers' run with the Python of their own environment.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

import numpy as np
import torch

from benchmarks.harness import CLOCKS, synchronize, timed
from lit_llama import aligner
from lit_llama.checkpoint import load_model
from lit_llama.data import SFTData
from lit_llama.dpo import DPOData
from lit_llama.generation import Sampling, decode, generate
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.onednn import pack_

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}


def memory(field: str, process: str = "self") -> int:
    """Bytes of this process from /proc, "VmRSS" now or "VmHWM" at most; 0 where there is no /proc."""
    status = Path(f"/proc/{process}/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


class Ours:
    """The base with an Aligner of `n` prefix tokens; n = 0 is the bare base.

    The bare base is the limit of training: a gradient begins where the first aligned layer adds its term, and
    nothing is added.
    """

    def __init__(self, settings: dict[str, Any], device: torch.device) -> None:
        self.n, self.start = settings["n"], settings.get("start", 2)
        self.device, self.dtype = device, DTYPES[settings["precision"]]
        self.weights, self.learning_rate = Path(settings["weights"]), 1e-3

    def load(self) -> None:
        own = dict(adapter_prompt_length=self.n, adapter_start_layer=self.start)
        method = dict(method="aligner", method_config=own) if self.n else {}
        self.take(load_model(self.weights, **method, device=self.device, dtype=self.dtype))

    def build(self, config: dict[str, Any]) -> None:
        """As `load`, of any shape, with random weights."""
        torch.manual_seed(0)
        own = dict(adapter_prompt_length=self.n, adapter_start_layer=self.start)
        with self.device:
            model = aligner.LLaMA(aligner.LLaMAConfig(**config, **own)) if self.n else LLaMA(LLaMAConfig(**config))
        self.take(model.to(self.dtype))

    def take(self, model: LLaMA) -> None:
        self.model = model
        aligner.mark_only_adapter_as_trainable(model)
        for name, p in model.named_parameters():
            if name.endswith("gating_factor"):  # a closed gate would cost the same; an open one is no special case
                torch.nn.init.normal_(p, std=0.1)
        if not self.n:
            model.transformer.h[self.start].attn.c_proj.register_forward_pre_hook(
                lambda module, args: args[0].detach().requires_grad_() if torch.is_grad_enabled() else None
            )

    def trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def mean_loss(self, data: SFTData | DPOData, batch: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
        if kind == "sft of pairs":
            return -self.model(batch["idx"], labels=batch["labels"]).mean()
        count = len(batch["idx"]) / 2 if kind == "dpo" else (batch["labels"][:, 1:] != -1).sum()
        return data.losses(self.model, batch)["loss"] / count

    def tokens(self, prompts: list[list[int]], n_new: int) -> Iterator[Any]:
        for tokens in decode(self.model, prompts, Sampling(n_new)):
            yield tokens.tolist()


class Transformers:
    """transformers' LLaMA, with one of PEFT's methods ("lora", "adaption_prompt") or alone ("")."""

    def __init__(self, settings: dict[str, Any], device: torch.device) -> None:
        self.method, self.learning_rate = settings["method"], 1e-3
        self.device, self.dtype = device, DTYPES[settings["precision"]]
        self.weights = Path(settings["weights"]) / "hf"
        import transformers

        transformers.logging.set_verbosity_error()
        self.library = transformers
        if self.method:
            import peft

            self.peft = peft

    def load(self) -> None:
        model = self.library.AutoModelForCausalLM.from_pretrained(self.weights, dtype=self.dtype).to(self.device)
        if self.method == "lora":
            config = self.peft.LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")
        elif self.method == "adaption_prompt":
            layers = model.config.num_hidden_layers - 2
            config = self.peft.AdaptionPromptConfig(adapter_len=10, adapter_layers=layers, task_type="CAUSAL_LM")
        self.model = self.peft.get_peft_model(model, config) if self.method else model

    def trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def mean_loss(self, data: SFTData, batch: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
        idx, labels = batch["idx"], batch["labels"]
        lengths = torch.as_tensor(batch["lengths"], device=idx.device).unsqueeze(1)
        mask = (torch.arange(idx.size(1), device=idx.device) < lengths).long()
        return self.model(input_ids=idx, attention_mask=mask, labels=labels.masked_fill(labels == -1, -100)).loss

    def tokens(self, prompts: list[list[int]], n_new: int) -> Iterator[Any]:
        idx = torch.tensor(prompts, device=self.device)
        times: list[float] = []

        def stopping(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            if len(times) in (0, n_new - 1):
                synchronize(self.device)
            times.append(self.now())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        self.model.eval().generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=n_new, do_sample=False, eos_token_id=None,
            pad_token_id=0, cache_implementation="static", stopping_criteria=[stopping],
        )  # fmt: skip
        yield from times


class LitGPT:
    """LitGPT's adapter with its defaults (10 tokens per layer, from layer 2)."""

    def __init__(self, settings: dict[str, Any], device: torch.device) -> None:
        from litgpt import adapter, utils
        from litgpt.generate.base import batched_generate_fn, generate_fn
        from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

        self.adapter, self.cross_entropy, self.copy = adapter, utils.chunked_cross_entropy, copy_weights_hf_llama
        self.generate, self.generate_batch = generate_fn, batched_generate_fn
        self.device, self.dtype, self.learning_rate = device, DTYPES[settings["precision"]], 1e-3
        self.weights, self.aligned = Path(settings["weights"]), settings["method"] == "adapter"

    def load(self) -> None:
        ours = LLaMAConfig.from_json(self.weights / "lit_config.json")
        own = {} if self.aligned else {"adapter_start_layer": ours.n_layer}
        config = self.adapter.Config(
            block_size=ours.block_size, vocab_size=ours.vocab_size, padded_vocab_size=ours.vocab_size,
            n_layer=ours.n_layer, n_head=ours.n_head, n_query_groups=ours.n_kv_head, n_embd=ours.n_embd,
            head_size=ours.head_size, intermediate_size=ours.intermediate_size, rotary_percentage=1.0,
            parallel_residual=False, bias=False, norm_class_name="RMSNorm", norm_eps=ours.norm_eps,
            mlp_class_name="LLaMAMLP", rope_base=int(ours.rope_base), **own,
        )  # fmt: skip
        from safetensors.torch import load_file

        state: dict[str, torch.Tensor] = {}
        self.copy(config, {}, state, load_file(self.weights / "hf" / "model.safetensors"), dtype=self.dtype)
        with torch.device("meta"):
            model = self.adapter.GPT(config)
        model.load_state_dict(state, strict=False, assign=True)
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                if p.is_meta:  # the adapter's
                    setattr(module, name, torch.nn.Parameter(0.1 * torch.randn(p.shape)))
        model.cos, model.sin = model.rope_cache(self.device)
        self.model = model.to(self.device, self.dtype)
        self.adapter.mark_only_adapter_as_trainable(self.model)

    def trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def mean_loss(self, data: SFTData, batch: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
        for block in self.model.transformer.h:
            block.attn.adapter_kv_cache = None  # kept from an earlier step it would stop the second backward pass
        labels = batch["labels"].masked_fill(batch["labels"] == -1, -100)
        logits = self.model(batch["idx"], lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        return self.cross_entropy(logits, labels[..., 1:])

    def tokens(self, prompts: list[list[int]], n_new: int) -> Iterator[Any]:
        self.model.eval()
        idx = torch.tensor(prompts, device=self.device)
        length = idx.size(1) + n_new
        self.model.max_seq_length = length
        self.model.set_kv_cache(len(idx), device=self.device, dtype=self.dtype)
        common = dict(include_prompt=False, include_eos=False)
        if len(prompts) == 1:
            yield from self.generate(self.model, idx[0], length, temperature=0.0, **common)
        else:
            yield from self.generate_batch(self.model, idx, length, sample_args={"temperature": 0.0}, **common)


KINDS = {"ours": Ours, "transformers": Transformers, "litgpt": LitGPT}


class Worker:
    """Answers the calls; each method below `load` is one."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        self.device = torch.device(settings["device"])
        self.clock = settings.get("clock", "wall")
        self.side = KINDS[settings["kind"]](settings, self.device)
        self.side.now = CLOCKS[self.clock]
        self.data: dict[str, SFTData | DPOData] = {}
        self.data_dir = Path(settings["data"]) if "data" in settings else None
        self.optimizer: torch.optim.Optimizer | None = None
        self.weight_bytes = 0
        self.packs = settings.get("generates", False)  # only ours: as the generate scripts do

    def load(self) -> dict[str, Any]:
        """Loads the model and starts to count memory."""
        self.before = memory("VmRSS")
        sizes = self.load_side()
        self.forget_peak()
        return sizes

    def load_side(self) -> dict[str, Any]:
        self.side.load()
        sizes = self.size()
        if self.packs:
            pack_(self.side.model)
        return sizes

    def build(self, n: int, config: dict[str, Any]) -> dict[str, Any]:
        """A model of ours of another shape."""
        self.side.n = n
        self.side.build(config)
        self.optimizer = None
        return self.size()

    def size(self) -> dict[str, Any]:
        parameters = list(self.side.model.parameters())
        self.weight_bytes = sum(p.nbytes for p in parameters if not p.requires_grad)
        sizes = {"trainable": sum(p.numel() for p in self.side.trainable()), "bytes": sum(p.nbytes for p in parameters)}
        return sizes

    def forget_peak(self) -> dict[str, Any]:
        """Begins to watch for the most memory anew."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")
        return {}

    def peak(self) -> dict[str, Any]:
        """Bytes held at most since the model was loaded, with and without the frozen weights."""
        cuda = self.device.type == "cuda"
        most = torch.cuda.max_memory_allocated() if cuda else memory("VmHWM") - self.before
        return {"peak": most, "beyond": most - self.weight_bytes}

    def rows_of(self, kind: str) -> SFTData | DPOData:
        if kind not in self.data:
            if kind == "sft":
                self.data[kind] = SFTData(self.data_dir / "sft", "train")
            else:
                data = DPOData(self.data_dir / "pairs", "train")
                data.reference_logps = torch.full((len(data), 2), -100.0)  # as if computed beforehand
                self.data[kind] = data
        return self.data[kind]

    def step(self, micro_batches: list[list[int]], kind: str = "sft") -> dict[str, Any]:
        """One optimiser step, on a GPU after one that is not counted: seconds of its parts, and the mean loss."""
        data = self.rows_of(kind)
        if self.device.type == "cuda":
            self.time_step(data, [np.array(rows) for rows in micro_batches[:1]], kind)
        answer = self.time_step(data, [np.array(rows) for rows in micro_batches], kind)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the others need the room
        return answer

    def time_step(self, data: Any, micro_batches: list[np.ndarray], kind: str) -> dict[str, Any]:
        seconds = dict.fromkeys(("data", "forward", "backward", "optimiser"), 0.0)
        found: dict[str, Any] = {}
        self.side.model.train()

        def part(name: str, work: Callable[[], Any]) -> Any:
            def keep() -> None:
                found[name] = work()

            seconds[name] += timed(keep, self.device, self.clock)
            return found[name]

        losses = []
        for rows in micro_batches:
            batch = part("data", lambda rows=rows: {k: t.to(self.device) for k, t in data.batch(rows).items()})
            batch["lengths"] = data.lengths[rows]
            loss = part("forward", lambda batch=batch: self.side.mean_loss(data, batch, kind))
            part("backward", lambda loss=loss: (loss / len(micro_batches)).backward())
            losses.append(loss.item())
        part("optimiser", self.update)
        return {"seconds": seconds, "loss": float(np.mean(losses))}

    def update(self) -> None:
        trainable = self.side.trainable()
        if trainable:
            if self.optimizer is None:
                self.optimizer = torch.optim.AdamW(trainable, lr=self.side.learning_rate)
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def random_step(self, rows: int, length: int) -> dict[str, Any]:
        """Seconds of a forward and a backward pass on random tokens, half of them predicted; the better of two."""
        idx = torch.randint(3, self.side.model.config.vocab_size, (rows, length), device=self.device)
        labels = idx.clone()
        labels[:, : length // 2] = -1

        def once() -> None:
            (-self.side.model(idx, labels=labels).mean()).backward()

        return {"seconds": min(timed(once, self.device, self.clock) for _ in range(2))}

    def generate(self, prompts: list[list[int]], n_new: int) -> dict[str, Any]:
        """Seconds to the first token, and from there to the last."""
        if self.device.type == "cuda":
            list(self.side.tokens(prompts, 2))
        synchronize(self.device)
        began = self.side.now()
        times = []
        with torch.no_grad():
            for token in self.side.tokens(prompts, n_new):
                if len(times) in (0, n_new - 1):
                    synchronize(self.device)
                times.append(token if isinstance(token, float) else self.side.now())
        assert len(times) == n_new, f"{len(times)} tokens instead of {n_new}"
        return {"prefill": times[0] - began, "decode": times[-1] - times[0]}

    def answer_all(self, prompts: list[list[int]], n_new: int, batch_size: int) -> dict[str, Any]:
        """Seconds for all prompts, so many at a time."""

        def work() -> None:
            for i in range(0, len(prompts), batch_size):
                generate(self.side.model, prompts[i : i + batch_size], Sampling(n_new))

        return {"seconds": timed(work, self.device, self.clock)}

    def first_token(self, prompt: list[int]) -> dict[str, Any]:
        """Loads the model and makes one token: the seconds, and the bytes held at most."""
        self.before = memory("VmRSS")
        self.forget_peak()
        began = self.side.now()
        sizes = self.load_side()
        with torch.no_grad():
            next(iter(self.side.tokens([prompt], 1)))
        synchronize(self.device)
        seconds = self.side.now() - began
        return {"seconds": seconds, **sizes, **self.peak()}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            worker = worker or Worker(json.loads(sys.argv[1]))
            say(getattr(worker, request.pop("call"))(**request))
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            say({"error": first.rstrip(".")})


if __name__ == "__main__":
    main()
