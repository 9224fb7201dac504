"""Compiled layers, and decoding steps as CUDA graphs (`--compile`).

Each layer is compiled separately: all layers of a kind share the code, so compiling takes seconds instead of minutes.
On a GPU a decoding step of all layers is recorded once per batch as a CUDA graph, and then costs one launch. This needs
fixed shapes and addresses: a static `KVCache`, and token and position tensors that are written in place.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from typing import Any, ClassVar, Literal

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_llama.sharding import is_sharded
from lit_llama.utils import UserError
from lit_llama.variant import Variant

Step = Callable[[Tensor, Tensor], Tensor]  # tokens (B,) and their positions (B,) -> logits (B, V)
RECOMPILE_LIMIT = 64  # versions of a layer's code that may be compiled
runs_eagerly = ContextVar("runs_eagerly", default=False)  # within `eager_unless`
WARM_UP = 3  # steps before recording: the first ones compile, choose algorithms and allocate workspaces


def compile_(model: Variant, purpose: Literal["training", "decoding"], backend: str = "inductor") -> None:
    """Compile the layers of a model, in place. The compiler runs when they are first called.

    Args:
        purpose: what the compiled layers are used for; everything else runs as before.
        backend: backend of `torch.compile`.

    Raises:
        UserError: The layers cannot be compiled because they are quantized or sharded.
    """
    if is_sharded(model):
        raise UserError("--compile does not work with sharded layers.")
    if any(isinstance(m, nn.Linear) and not m.weight.is_floating_point() for m in model.transformer.h.modules()):
        raise UserError("--compile and --quantize cannot be combined: quantized layers cannot be compiled.")
    import torch._dynamo  # takes a second

    # a few layer classes, each with and without gradients and with one shape or several; the default is 8
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    # by default, DDP splits a graph at each MiB of trained parameters, as in LoRA with a large rank
    torch._dynamo.config.optimize_ddp = False
    for block in model.transformer.h:
        if purpose == "training" and model.transformer.wte.weight.device.type == "cpu":
            block.forward = with_plain_attention(torch.compile(block.forward, fullgraph=True, backend=backend))
        else:
            block.compile(fullgraph=True, backend=backend)
    model.compiled = purpose


def with_plain_attention(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a compiled forward pass that computes attention as matrix products and a softmax.

    The compiled backward pass of the CPU's fused attention expects the strides of the first length that it was compiled
    for, and fails with others (seen with torch 2.13). The price is memory for the probabilities, (B, nh, T, T) a layer.
    The backend is set outside of the compiled code, because a setting made inside it would not be reset afterwards.
    """

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        with nullcontext() if runs_eagerly.get() else sdpa_kernel(SDPBackend.MATH):
            return forward(*args, **kwargs)

    return call


@contextmanager
def eager_unless(model: Variant, purpose: str) -> Iterator[None]:
    """Temporarily run a model without its compiled layers, unless they are for this purpose."""
    if model.compiled in (None, purpose):  # then the compiler, whose import takes a second, is not needed
        yield
        return
    token = runs_eagerly.set(True)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        runs_eagerly.reset(token)


class RecordedStep:
    """A decoding step that is recorded as a CUDA graph when it is first called, and replayed from then on.

    The logits that it returns are overwritten by the next call.

    Args:
        step: a step with static shapes; calling it twice with the same arguments must be the same as calling it once.
    """

    streams: ClassVar[dict[torch.device, Any]] = {}  # one for each device: cuBLAS keeps a workspace per stream

    def __init__(self, step: Step) -> None:
        self.step, self.graph = step, torch.cuda.CUDAGraph()
        self.tokens = self.positions = self.logits = None

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if self.logits is None:
            self.record(tokens, positions)
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.graph.replay()
        return self.logits

    def record(self, tokens: Tensor, positions: Tensor) -> None:
        self.tokens, self.positions = tokens.clone(), positions.clone()
        with torch.cuda.device(tokens.device):
            if tokens.device not in self.streams:
                self.streams[tokens.device] = torch.cuda.Stream()
            stream = self.streams[tokens.device]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.step(self.tokens, self.positions)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph, stream=stream):
                self.logits = self.step(self.tokens, self.positions)
