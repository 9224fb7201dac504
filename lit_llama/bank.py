"""A bank: many Aligners of one base, kept in memory by name.

A bank stores only the trained parameters (the prefix, then the gates), not their projections. For one token at 7B
that is 4,096 + 30 · 32 = 5,056 numbers; the projected values of all layers would be 24 times as many. Batches use a
bank through lit_llama/compose.py.

A bank is saved as a safetensors file with these tensors for i = 0, 1, ...:

    adapters.i   (n, N·C + layers·nh) fp32 or bf16: n adapters of N tokens each, layers from the start layer up
    names.i      UTF-8 JSON as bytes: [[name, prompt style], ...] of the n adapters

and a header entry `lit_llama_bank`: JSON with the base's config and fingerprint, start_layer, and each N as `lengths`.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_llama.checkpoint import CONFIG_NAME, AdapterFile, base_fingerprint, check_base, is_ours, read_adapter
from lit_llama.huggingface.hub import is_on_hub, repository
from lit_llama.model import LLaMAConfig
from lit_llama.storage.files import atomic_write
from lit_llama.storage.schema import field
from lit_llama.storage.tensor_files import read_header
from lit_llama.utils import UserError
from lit_llama.variant import check_shapes

BLOCK_BYTES = 2**26  # a bank grows by allocating blocks of this size, so that growing copies nothing
COMPARED = 1000  # an unknown name is compared with this many, the first ones
META_KEY = "lit_llama_bank"  # header entry of a bank's file
START_LAYER = 2  # lowest start layer of a bank, unless its first adapters start lower; the default of training
BASE = "base"  # the reserved name of the base model without an adapter


class Slot(NamedTuple):
    """Where an adapter is stored, and the prompt style that it was trained with."""

    block: Tensor  # (n, N·C + layers·nh), adapters of one prefix length N
    row: int
    style: str | None  # None only in `Bank.free`


class Gathered(NamedTuple):
    """Copies of adapters of one prefix length N, which later changes to their bank do not affect."""

    names: list[str]
    slots: list[Slot]
    prefixes: Tensor  # (n, N, C) fp32
    gates: Tensor  # (n, layers, nh) fp32


class Bank(dict[str, Slot]):
    """A dictionary of the Aligners of one base, of any prefix lengths; change it with `add`, `swap` and `remove`.

    An unknown name raises a UserError that lists similar ones.

    Args:
        config: the base's configuration.
        checkpoint_dir: the base's folder, to refuse adapters of another base; None accepts all adapters of this shape,
            unless `load` found the base's fingerprint in the file.
        start_layer: lowest start layer that the bank accepts; adapters with a higher one have zero gates below it.
        dtype: fp32 returns adapters bit for bit. bf16 halves the memory: under a bf16 base only the gates are rounded,
            because such a base rounds the prefix anyway.
        device: where the adapters are stored; a model copies those of a batch to its own device.
    """

    def __init__(
        self,
        config: LLaMAConfig,
        checkpoint_dir: Path | None = None,
        *,
        start_layer: int = START_LAYER,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if not 0 <= start_layer < config.n_layer:
            raise UserError(f"start_layer is {start_layer}; it must be from 0 to {config.n_layer - 1}.")
        self.config, self.checkpoint_dir, self.start_layer = config, checkpoint_dir, start_layer
        self.dtype, self.device = dtype, torch.device(device)
        self.base = None if checkpoint_dir is None else base_fingerprint(checkpoint_dir)
        self.n_gates = (config.n_layer - start_layer) * config.n_head
        # Free rows, by block width. A slot with a style is the row of a removed adapter; one without a style marks the
        # first unused row of its block, and all rows after it are unused too.
        self.free: defaultdict[int, list[Slot]] = defaultdict(list)

    def __missing__(self, name: str) -> Slot:
        some = [*islice(self, COMPARED)]  # comparing with a million names would block a server
        near = get_close_matches(name, some, 3)
        hint = f"; {'similar' if near else 'some'} names are {', '.join(map(repr, near or some[:3]))}" if some else ""
        raise UserError(f"There is no adapter named {name!r} among the {len(self)} of the bank{hint}.")

    @property
    def nbytes(self) -> int:
        """The size of all prefixes and gates in bytes, without names."""
        return sum(slot.block.size(1) for slot in self.values()) * self.dtype.itemsize

    def add(self, name: str, adapter: AdapterFile) -> None:
        """Copy an adapter into the bank.

        Raises:
            UserError: The name is taken, or the adapter is not an Aligner, belongs to another base, or starts below
                `start_layer` or above the last layer.
        """
        if name in self or name in ("", BASE):
            raise UserError(f"The name {name!r} is taken; choose another one, or swap the adapter.")
        self._store(name, self._pack(adapter), adapter.meta.get("prompt_style"))

    def swap(self, name: str, adapter: AdapterFile) -> None:
        """Replace the adapter of a name. If `adapter` is refused, as in `add`, the bank is unchanged."""
        old, packed = self[name], self._pack(adapter)
        self.free[old.block.size(1)].append(old)  # an adapter of the same length takes its row
        self._store(name, packed, adapter.meta.get("prompt_style"))

    def remove(self, name: str) -> None:
        """Remove an adapter; its memory is reused."""
        old = self[name]
        self.free[old.block.size(1)].append(old)
        del self[name]

    def adapter(self, name: str) -> AdapterFile:
        """Return an adapter as `read_adapter` does, with gates from the bank's `start_layer` up."""
        ((_, _, (prefix,), (gates,)),) = self.gather([name])
        state = {"global_value_embedding.weight": prefix}
        for layer, layer_gates in enumerate(gates, self.start_layer):
            state[f"transformer.h.{layer}.attn.gating_factor"] = layer_gates.view(1, -1, 1, 1)
        config = {"adapter_prompt_length": len(prefix), "adapter_start_layer": self.start_layer}
        meta = {"method": "aligner", "config": config, "prompt_style": self[name].style}
        return AdapterFile(state, meta | ({"base": self.base} if self.base else {}), Path(name))

    def check(self, name: str) -> None:
        """Check that the bank has an adapter, and that its numbers are finite. `load` does not check this.

        Raises:
            UserError: There is no such name, or its adapter contains NaN or infinity.
        """
        slot = self[name]
        if not slot.block[slot.row].isfinite().all():
            raise UserError(f"The adapter {name!r} of the bank holds numbers that are not finite (NaN or infinity).")

    def gather(self, names: Sequence[str]) -> list[Gathered]:
        """Return copies of the adapters of these names, each once, by prefix length N in ascending order."""
        members: defaultdict[int, list[str]] = defaultdict(list)
        for name in dict.fromkeys(names):
            members[self[name].block.size(1)].append(name)
        gathered, (C, nh) = [], (self.config.n_embd, self.config.n_head)
        for width, alike in sorted(members.items()):
            slots = [self[name] for name in alike]
            packed = torch.stack([slot.block[slot.row] for slot in slots]).float()
            prefixes, gates = packed.split([width - self.n_gates, self.n_gates], dim=1)
            gathered.append(Gathered(alike, slots, prefixes.unflatten(1, (-1, C)), gates.unflatten(1, (-1, nh))))
        return gathered

    def _pack(self, adapter: AdapterFile) -> Tensor:
        """Check an adapter and return its prefix and gates, concatenated: (N·C + layers·nh,)."""
        config = self.config
        if adapter.method != "aligner":
            raise UserError(f"{adapter.path} was made by the method {adapter.method!r}; a bank holds Aligners.")
        if self.base is not None:
            check_base(adapter, self.checkpoint_dir or Path("the bank"), config, self.base)
        start = adapter.config["adapter_start_layer"]
        if start < self.start_layer:
            raise UserError(
                f"{adapter.path} starts at layer {start}, below the bank's start layer {self.start_layer}; name it "
                "in --bank or --adapter when the program starts."
            )
        if start >= config.n_layer:
            raise UserError(f"{adapter.path} starts at layer {start}; the base's last layer is {config.n_layer - 1}.")
        shapes = {"global_value_embedding.weight": (adapter.config["adapter_prompt_length"], config.n_embd)}
        for layer in range(start, config.n_layer):
            shapes[f"transformer.h.{layer}.attn.gating_factor"] = (1, config.n_head, 1, 1)
        check_shapes(adapter.state, shapes, f"{adapter.path} does not fit the bank's base")
        zero_gates = torch.zeros((start - self.start_layer) * config.n_head)
        prefix, *gates = (adapter.state[name].detach().flatten().float().cpu() for name in shapes)
        return torch.cat([prefix, zero_gates, *gates])

    def _store(self, name: str, packed: Tensor, style: str | None) -> None:
        width = len(packed)
        if not self.free[width]:
            n_rows = max(1, BLOCK_BYTES // (width * self.dtype.itemsize))
            block = torch.empty(n_rows, width, dtype=self.dtype, device=self.device)
            self.free[width].append(Slot(block, 0, None))
        block, row, former = self.free[width].pop()
        if former is None and row + 1 < len(block):
            self.free[width].append(Slot(block, row + 1, None))
        block[row] = packed
        self[name] = Slot(block, row, sys.intern(style or "alpaca"))

    def save(self, path: Path, overwrite: bool = False) -> None:
        """Write all adapters and names into one safetensors file; see the top of this module for its format.

        A file that is not a bank is replaced only with `overwrite`.
        """
        members = defaultdict(list)
        for name, (block, row, style) in self.items():
            members[block].append((row, (name, style)))
        tensors, lengths = {}, []
        for i, (block, stored) in enumerate(members.items()):
            rows, names = zip(*sorted(stored), strict=True)
            without_gaps = rows[-1] == len(rows) - 1  # then a view suffices
            tensors[f"adapters.{i}"] = (block[: len(rows)] if without_gaps else block[list(rows)]).cpu()
            tensors[f"names.{i}"] = torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8)
            lengths.append((block.size(1) - self.n_gates) // self.config.n_embd)
        meta = {"config": json.loads(self.config.to_json()), "start_layer": self.start_layer, "base": self.base}
        with atomic_write(path, overwrite=overwrite or is_ours(path, META_KEY)) as temporary:
            save_file(tensors, temporary, metadata={META_KEY: json.dumps({**meta, "lengths": lengths})})

    @classmethod
    def load(cls, path: Path, checkpoint_dir: Path | None = None, *, device: torch.device | str = "cpu") -> "Bank":
        """Open a file that `save` wrote.

        On a CPU the file is memory-mapped: an adapter is read when it is first used, and the file must not change
        while the bank is in use. Changes to the bank do not change the file.

        Raises:
            UserError: The file does not exist, is not a bank, or belongs to another base.
        """
        meta = read_header(path, META_KEY)
        if meta is None:
            raise UserError(f"{path} is not a bank of adapters.")
        try:
            config = LLaMAConfig(**meta["config"])
            bank = cls(config, checkpoint_dir, start_layer=field(meta, "start_layer", int, "its header"), device=device)
            made_for = field(meta, "base", dict | None, "its header")
            for name, kind in (("config", dict), ("weights", str)) if made_for is not None else ():
                field(made_for, name, kind, "its header: base")
            if bank.base is None:
                bank.base = made_for
            else:
                made_for = made_for or {**bank.base, "config": meta["config"]}
                check_base(AdapterFile({}, {"base": made_for}, path), checkpoint_dir, config, bank.base)
            with safe_open(path, framework="pt") as file:
                for i, length in enumerate(meta["lengths"]):
                    block = file.get_tensor(f"adapters.{i}")
                    names = json.loads(file.get_tensor(f"names.{i}").numpy().tobytes())
                    bank._insert(block, length, names)
        except UserError as error:
            raise UserError(f"The bank {path} cannot be used: {error}") from None
        except Exception as error:  # each kind of damage raises its own type
            if "unable to mmap" in str(error):
                raise UserError(
                    f"The bank {path} ({path.stat().st_size / 1e9:.0f} GB) cannot be mapped into memory: add memory or "
                    "swap space."
                ) from None
            raise UserError(f"The bank {path} is damaged ({type(error).__name__}: {error}).") from None
        return bank

    def _insert(self, block: Tensor, length: int, names: list[tuple[str, str]]) -> None:
        """Insert the adapters of one tensor in a file, with their names and styles.

        Raises:
            ValueError: The file is damaged.
        """
        shape = (len(names), length * self.config.n_embd + self.n_gates)
        if length < 1 or block.shape != shape or block.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"a tensor is {tuple(block.shape)}, {block.dtype}; it must be {shape}")
        self.dtype, block, count = block.dtype, block.to(self.device), len(self)
        self.update((name, Slot(block, row, sys.intern(style))) for row, (name, style) in enumerate(names))
        if len(self) != count + len(names) or not all(type(name) is str for name, _ in names):
            raise ValueError("a name occurs twice or is not text")


def open_bank(paths: Sequence[Path], checkpoint_dir: Path) -> Bank:
    """Return the bank of one bank file, or a bank of adapter files and folders, named by `adapter_names`.

    A bank of files and folders also accepts later adapters that start at `START_LAYER` or higher.

    Raises:
        UserError: A path is neither, an adapter does not belong to the base, or a path is given twice.
    """
    paths = [Path(path) for path in paths]
    if len(paths) == 1 and paths[0].is_file() and read_header(paths[0], META_KEY) is not None:
        bank = Bank.load(paths[0], checkpoint_dir)
        if not bank:
            raise UserError(f"The bank {paths[0]} has no adapters.")
        return bank
    adapters = [read_adapter(path) for path in paths]
    return make_bank(checkpoint_dir, list(zip(adapter_names(paths), adapters, strict=True)), START_LAYER)


def adapter_name(path: Path) -> str:
    """Return the name that an adapter gets in a bank: that of its folder, its file, or its repository on the Hub."""
    if is_on_hub(path):
        return repository(path)[0].partition("/")[2]
    return path.resolve().name if path.is_dir() else path.stem


def adapter_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each adapter: its `adapter_name`, or its path if the name is `BASE` or not unique."""
    names = [adapter_name(path) for path in paths]
    counts = Counter([BASE, *names])
    unique = [str(path.resolve() if str(path) == BASE else path) for path in paths]
    return [name if counts[name] == 1 else path for name, path in zip(names, unique, strict=True)]


def make_bank(
    checkpoint_dir: Path, adapters: Sequence[tuple[str, AdapterFile]], start_layer: int | None = None
) -> Bank:
    """Return a bank of named adapters.

    Args:
        start_layer: a start layer that the bank also accepts, if these adapters start higher (default: the lowest of
            theirs).

    Raises:
        UserError: As in `Bank.add`.
    """
    config = LLaMAConfig.from_json(Path(checkpoint_dir) / CONFIG_NAME)
    last = config.n_layer - 1
    starts = [adapter.config.get("adapter_start_layer", last) for _, adapter in adapters]
    bank = Bank(config, checkpoint_dir, start_layer=min(last if start_layer is None else start_layer, last, *starts))
    for name, adapter in adapters:
        bank.add(name, adapter)
    return bank
