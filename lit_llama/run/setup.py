"""Set up a training run: Fabric, the model, the optimizers and the metadata of the adapter."""

import os
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, get_args

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from lit_llama.aligner import mark_only_adapter_as_trainable
from lit_llama.checkpoint import AdapterFile, base_fingerprint, load_model, read_adapter
from lit_llama.compiled import compile_
from lit_llama.device import computes_bf16, disable_cudnn_attention
from lit_llama.logps import LabelLogps
from lit_llama.methods import method_config
from lit_llama.model import LLaMA
from lit_llama.run.folder import FILES
from lit_llama.run.processes import base_mesh, fabric_strategy, full_gpu_explained, launch, watch_processes
from lit_llama.run.train_settings import SHARDED, FinetuneSettings, Precision, TrainSettings
from lit_llama.storage.schema import field
from lit_llama.threads import note_if_busy
from lit_llama.utils import UserError

S = TypeVar("S", bound=FinetuneSettings)
T = TypeVar("T", bound=TrainSettings)

# `fabric run` starts all processes and passes its flags in environment variables
FABRIC_RUN = "LT_CLI_USED"
FABRIC_RUN_FLAGS = {name: f"LT_{name.upper()}" for name in ("accelerator", "devices", "num_nodes", "strategy",
                                                            "precision")}  # fmt: skip
PRECISION_ALIASES = {"32": "32-true", "bf16": "bf16-mixed"}  # of Fabric

# what an adapter records about its dataset
DATA = {"source": str, "counts": dict, "max_seq_length": int}
DOWNLOAD = {"repo_id": str, "config_name": str, "split": str, "revision": str}  # only of a dataset on the Hub


@dataclass
class Setup:
    """The objects that a run trains with.

    Args:
        fabric: Fabric, already launched.
        model: A `LabelLogps`, wrapped by Fabric. Only trainable parameters require a gradient.
        optimizers: Optimizers of the trainable parameters, wrapped by Fabric.
        adapter_meta: What adapter files record about the adapter; a resumed run must have the same.
    """

    fabric: Fabric
    model: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    adapter_meta: dict[str, Any]

    @property
    def unwrapped(self) -> LLaMA:
        """The model itself."""
        return self.model.module.module

    @classmethod
    def wrap(
        cls, fabric: Fabric, model: LLaMA, optimizers: list[torch.optim.Optimizer], adapter_meta: dict[str, Any]
    ) -> "Setup":
        """Wrap a model and its optimizers with Fabric."""
        wrapped = fabric.setup_module(LabelLogps(model))
        return cls(fabric, wrapped, [fabric.setup_optimizers(optimizer) for optimizer in optimizers], adapter_meta)


def make_fabric(settings: TrainSettings) -> Fabric:
    """Launch Fabric with the devices of the settings.

    On a GPU that computes in bf16, `precision="auto"` is bf16 for a frozen base and bf16-mixed for a trained one, whose
    weights stay fp32. Elsewhere it is fp32.

    Raises:
        UserError: Fabric refuses the combination, or it is not supported here.
    """
    frozen_base = isinstance(settings, FinetuneSettings)
    flags: dict[str, Any] = {name: getattr(settings, name) for name in FABRIC_RUN_FLAGS}
    flags["strategy"] = fabric_strategy(settings.strategy, settings.num_nodes)
    if flags["precision"] == "auto":
        bf16 = "bf16-true" if frozen_base else "bf16-mixed"
        flags["precision"] = bf16 if computes_bf16(settings.accelerator) else "32-true"
    try:
        fabric = Fabric(**flags)
    except KeyError as error:
        raise UserError(
            f"The environment has some variables of SLURM or torchrun, but not {error.args[0]}: start the script with "
            "srun or torchrun, or unset these variables."
        ) from None
    except Exception as error:  # Fabric raises many types, all about the flags
        raise UserError(f"Fabric refuses these settings: {error}") from None
    check_fabric(fabric, settings.strategy, frozen_base)
    disable_cudnn_attention()
    if FABRIC_RUN not in os.environ:
        launch(fabric, settings.num_nodes)
    check_processes(fabric)
    watch_processes(fabric)
    return fabric


def with_launcher_flags(settings: T) -> T:
    """Return the settings with the flags of `fabric run`, and remove these from the environment.

    Fabric would read them there, too, and use its strategy of that name, which differs from ours.

    Raises:
        UserError: A flag is out of range, or cannot be combined with the other settings.
    """
    if FABRIC_RUN not in os.environ:
        return settings
    flags: dict[str, Any] = {n: os.environ.pop(key) for n, key in FABRIC_RUN_FLAGS.items() if key in os.environ}
    flags |= {name: int(flags[name]) for name in ("devices", "num_nodes") if flags.get(name, "").isdecimal()}
    if flags.get("accelerator") == "gpu":  # Fabric's name for either
        flags["accelerator"] = "mps" if torch.backends.mps.is_available() else "cuda"
    if flags.get("precision") in PRECISION_ALIASES:
        flags["precision"] = PRECISION_ALIASES[flags["precision"]]
    return replace(settings, **flags)


def check_fabric(fabric: Fabric, strategy: str, frozen_base: bool) -> None:
    """Refuse strategies and precisions that the training loop does not support."""
    supported = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)
    if type(fabric.strategy) not in supported or "spawn" in strategy or "fork" in strategy:
        raise UserError(
            f"The strategy {strategy!r} ({type(fabric.strategy).__name__}) is not supported; use 'ddp' for several "
            "devices with a complete base each, or 'fsdp' for a base that is sharded over them."
        )
    if strategy in SHARDED and not frozen_base:
        raise UserError(f"--strategy {strategy} shards a frozen base, and here the base is trained; use ddp.")
    precisions, precision = get_args(Precision)[1:], fabric.strategy.precision.precision
    where = ""
    if not frozen_base:  # trained weights must be fp32
        precisions, where = [name for name in precisions if name != "bf16-true"], " where the base is trained"
    if precision not in precisions:
        raise UserError(f"The precision {precision} is not supported{where}; use {', '.join(precisions)}.")


def check_processes(fabric: Fabric) -> None:
    """Check that SLURM or torchrun started one process for each device that the settings ask for.

    Raises:
        UserError: It started another number, so training would use other devices than asked for.
    """
    if not isinstance(fabric.strategy, DDPStrategy | ModelParallelStrategy):
        return
    devices = fabric.strategy.num_processes
    expected = devices * fabric.strategy.num_nodes
    if fabric.world_size != expected:
        raise UserError(
            f"SLURM or torchrun started {fabric.world_size} instead of {expected} processes: let it start as many on "
            f"each machine as --devices says (srun --ntasks-per-node={devices}, torchrun --nproc-per-node={devices})."
        )


def base_dtype(fabric: Fabric) -> torch.dtype:
    """Return the dtype of the frozen base under the precision of the run."""
    return torch.bfloat16 if fabric.strategy.precision.precision == "bf16-true" else torch.float32


def set_up_finetuning(settings: FinetuneSettings, data_meta: dict[str, Any]) -> Setup:
    """Launch Fabric and load the base with the initial adapter, or with a fresh one drawn from the seed.

    Args:
        data_meta: `meta.json` of the dataset.

    Raises:
        UserError: A file is missing or does not fit, or Fabric refuses a setting.
    """
    adapter, config = initial_adapter(settings), method_config(settings)
    fabric = make_fabric(settings)
    if fabric.device.type == "cpu" and fabric.world_size == 1:  # processes of this run would count as other programs
        note_if_busy(torch.get_num_threads())
    fabric.seed_everything(settings.seed, verbose=False)
    with full_gpu_explained(settings, "The base"):
        model = load_model(
            settings.checkpoint_dir,
            adapter,
            method=settings.method,
            method_config=config,
            device=fabric.device,
            dtype=base_dtype(fabric),
            quantize=settings.quantize,
            mesh=base_mesh(fabric, settings.strategy),
        )
    mark_only_adapter_as_trainable(model)
    model.gradient_checkpointing = settings.gradient_checkpointing
    if settings.compile:
        compile_(model, "training")
    kinds = DATA | {name: kind for name, kind in DOWNLOAD.items() if name in data_meta}
    meta = {
        "method": settings.method,
        "config": config if adapter is None else adapter.config,
        "base": base_fingerprint(settings.checkpoint_dir),
        "prompt_style": field(data_meta, "prompt_style", str, "meta.json of the dataset"),
        "data": {name: field(data_meta, name, kind, "meta.json of the dataset") for name, kind in kinds.items()},
    }
    return Setup.wrap(fabric, model, [adamw(model, settings)], meta)


def initial_adapter(settings: FinetuneSettings) -> AdapterFile | None:
    """Return the adapter that training starts from, None for a fresh one.

    Raises:
        UserError: The file is missing or one that the run replaces, or its method is not that of the settings.
    """
    if settings.init_adapter is None:
        return None
    adapter = read_adapter(settings.init_adapter)
    if adapter.method != settings.method:
        raise UserError(
            f"{adapter.path} was trained with the method {adapter.method!r} and cannot initialize one of the method "
            f"{settings.method!r}."
        )
    if adapter.path.resolve() in (settings.out_dir.resolve() / name for name in FILES):
        raise UserError(f"{adapter.path} is in --out_dir, where this run would replace it; choose another --out_dir.")
    return adapter


def with_initial_config(settings: S) -> S:
    """Return the settings, with the method's configuration replaced by that of the initial adapter."""
    adapter = initial_adapter(settings)
    config = {} if adapter is None else adapter.config
    return replace(settings, **{f.name: config[f.name] for f in fields(settings) if f.name in config})


def adamw(model: LLaMA, settings: TrainSettings) -> torch.optim.Optimizer:
    """Return AdamW on all parameters that require a gradient, without weight decay on gates, biases and scales."""
    decay, no_decay = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (no_decay if name.endswith(("gating_factor", "bias", "adapter_scale")) else decay).append(p)
    groups = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    fused = all(p.is_cuda for group in groups for p in group["params"])  # one kernel for all parameters
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=settings.weight_decay, fused=fused or None)
