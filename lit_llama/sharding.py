"""Shard a frozen base over several processes: fully sharded data parallel, PyTorch's FSDP2.

    process 0   ½ of wte │ ½ of block 0 │ ½ of block 1 │ … │ ½ of lm_head │ norm, prefix and gates
    process 1   ½ of wte │ ½ of block 0 │ ½ of block 1 │ … │ ½ of lm_head │ norm, prefix and gates

The rows of every matrix are divided among the processes. A layer is gathered from all of them for its forward pass, and
again for its backward pass. The trained parameters, a few thousand numbers in fp32, are replicated.

So every forward pass of one process needs the others. In training all processes make the same number of passes;
elsewhere, processes without work of their own assist the others (`in_step`).
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from lit_llama.console import transient_bar
from lit_llama.model import LLaMA
from lit_llama.modules import unwrapped
from lit_llama.utils import UserError

if TYPE_CHECKING:
    from lightning.fabric import Fabric  # takes seconds to import, and generation does not need it


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard_base_` was applied to a model, which may be wrapped."""
    return hasattr(unwrapped(model).transformer.wte.weight, "device_mesh")  # a DTensor


def count_shards(model: nn.Module) -> int:
    """Return the number of processes that share a base: those of one machine with "hsdp"; 1 if it is not sharded."""
    return unwrapped(model).transformer.wte.weight.device_mesh.size() if is_sharded(model) else 1


def sharded_parts(model: LLaMA) -> list[nn.Module]:
    """Return the modules that are gathered one at a time: the embedding, each block and the output layer."""
    return [part for part in (model.transformer.wte, *model.transformer.h, model.lm_head) if part is not None]


def only_assists(model: nn.Module) -> bool:
    """Return whether this process has no prompts to answer itself and only assists the first one with its shard."""
    return is_sharded(model) and unwrapped(model).transformer.wte.weight.device_mesh.get_local_rank() > 0


def check_shardable(model: LLaMA, quantize: str | None = None) -> None:
    """Check that a base can be sharded, before its weights are read.

    Raises:
        UserError: The base is to be quantized, or the method trains the output layer.
    """
    if quantize is not None:
        raise UserError(f"--quantize {quantize} does not work with a base that is sharded over devices; choose one.")
    if type(model).hidden_logps is not LLaMA.hidden_logps:  # it could read the output layer several times in a pass
        raise UserError(
            "A base cannot be sharded with this method, which trains the output layer; use one device (for training, "
            "--strategy ddp also works)."
        )


def shard_base_(model: LLaMA, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype) -> None:
    """Replace the parameters of the base with this process's rows of them, in place.

    All processes of the mesh must call this together. A process reads only its rows of a memory-mapped matrix.

    Args:
        model: The model with all weights, on the CPU; those of the base can be memory-mapped.
        mesh: The processes that share the base.
        device: Device of all parameters.
        dtype: Dtype of the base's parameters.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # takes a second to import
    from torch.distributed.tensor import DTensor, Shard

    if device.type == "cpu":
        return_freed_memory()
    adapter = set(model.adapter_parameters().values())
    head = model.transformer.wte if model.lm_head is None else model.lm_head
    for module in transient_bar(sharded_parts(model), "Loading the base", "layer"):
        base = {name: p.data for name, p in module.named_parameters() if p not in adapter}
        for name, mapped in base.items():
            set_frozen(module, name, torch.empty_like(mapped, dtype=dtype, device="meta"))
        fully_shard(module, mesh=mesh, ignored_params=adapter, reshard_after_forward=True)
        for name, mapped in base.items():
            rows = own_rows(mapped, mesh).to(device, dtype, copy=True)
            layout = {"shape": mapped.shape, "stride": mapped.stride()}
            set_frozen(module, name, DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, **layout))
    for p in model.parameters():
        if not isinstance(p, DTensor):
            p.data = p.data.to(device, p.dtype if p in adapter else dtype)
    model.rope.to(device)
    fully_shard(model, mesh=mesh, ignored_params=set(model.parameters()))  # owns nothing, and lets layers be prefetched
    register_fsdp_forward_method(model, "hidden")
    for name in ("unembed", "hidden_logps"):  # the methods that read the output layer
        setattr(head, name, getattr(model, name))
        register_fsdp_forward_method(head, name)
        setattr(model, name, getattr(head, name))
    model.inference = nullcontext  # layers are gathered only during a pass, so each pass projects the prefix
    with torch.no_grad():  # FSDP2 allocates in the first pass; what is allocated in inference mode could not be trained
        model(torch.zeros(1, 1, dtype=torch.long, device=device))


def own_rows(t: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Return the rows of a tensor that FSDP2 assigns to this process; none if there are too few."""
    chunks = t.chunk(mesh.size())
    return chunks[mesh.get_local_rank()] if mesh.get_local_rank() < len(chunks) else t[:0]


def set_frozen(module: nn.Module, name: str, value: torch.Tensor) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, nn.Parameter(value, requires_grad=False))


def return_freed_memory() -> None:
    """Let glibc return large blocks to the system when they are freed; by default it keeps many gathered layers."""
    M_MMAP_THRESHOLD = -3
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


@contextmanager
def in_step(model: nn.Module) -> Iterator[None]:
    """Let the processes of a sharded base make different numbers of forward passes in a block, without gradients.

    A process that has finished its block takes part in the passes of the others, with one token, until all have
    finished. If the base is not sharded, this does nothing.
    """
    if not is_sharded(model):
        yield
        return
    model = unwrapped(model)
    weight, problem = model.transformer.wte.weight, None

    def anyone_runs(runs: bool) -> bool:
        flag = torch.tensor(int(runs), device=weight.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=weight.device_mesh.get_group())
        return bool(flag.item())

    def announce(*_: Any) -> None:
        anyone_runs(True)

    hook = model.transformer.wte.register_forward_pre_hook(announce, prepend=True)  # before its rows are gathered
    try:
        yield
    except (UserError, OSError) as error:  # between two passes
        problem = error
    finally:
        hook.remove()
    with torch.no_grad():
        while anyone_runs(False):
            model(torch.zeros(1, 1, dtype=torch.long, device=weight.device))
    if problem is not None:
        raise problem


def average_gradients(fabric: "Fabric", model: nn.Module) -> None:
    """Average the gradients of the replicated parameters over all processes; for other models DDP does this.

    A parameter that the loss does not depend on has no gradient, which must be so in all processes.
    """
    if is_sharded(model):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = fabric.all_reduce(torch.cat([grad.flatten() for grad in gradients]), reduce_op="mean")
        for grad, mean in zip(gradients, flat.split([grad.numel() for grad in gradients]), strict=True):
            grad.copy_(mean.view_as(grad))
