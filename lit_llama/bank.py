"""A bank: many Aligners of one base, kept in memory under their names.

A bank stores what was trained, prefix and gates side by side, and no projections of them. For one token at 7B that is
4,096 + 30 · 32 = 5,056 numbers; the projected values of all layers would be 24 times as many. Batches use a bank
through lit_llama/compose.py.

The file of a bank is a safetensors file with these tensors for i = 0, 1, ...:

    adapters.i   (n, N·C + layers·nh) fp32 or bf16: n adapters of N tokens each, layers from the start layer up
    names.i      UTF-8 JSON as bytes: [[name, prompt style], ...] of the n adapters

and a header entry `lit_llama_bank`: JSON with the base's config and fingerprint, start_layer, and each N as `lengths`.
"""

import heapq
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lit_llama.checkpoint import CONFIG_NAME, AdapterFile, base_fingerprint, check_base, is_ours, read_adapter
from lit_llama.files import atomic_write
from lit_llama.model import LLaMAConfig
from lit_llama.utils import UserError
from lit_llama.variant import without_aliases

BLOCK_BYTES = 2**26  # a bank grows by allocating blocks of this size, so that growing copies nothing
META_KEY = "lit_llama_bank"  # header entry of a bank's file
BASE = "base"  # the reserved name of the base model without an adapter


@dataclass
class Block:
    """Memory for adapters of one prefix length N, one per row: prefix (N·C) and gates (layers·nh), side by side."""

    length: int
    data: torch.Tensor
    used: int = 0  # rows that have been allocated at least once


class Slot(NamedTuple):
    """Where an adapter is stored, and the prompt style that it was trained with."""

    block: Block
    row: int
    style: str


class Bank:
    """Aligners of one base, of any prefix lengths, in memory and addressed by name.

    `name in bank`, `len(bank)` and iteration over the names work as for a dictionary.

    Args:
        config: the base's configuration.
        checkpoint_dir: the base's folder, to refuse adapters of another base; None accepts all adapters of this shape.
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
        start_layer: int = 2,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 <= start_layer < config.n_layer:
            raise UserError(f"start_layer is {start_layer}; it must be from 0 to {config.n_layer - 1}.")
        self.config, self.checkpoint_dir, self.start_layer = config, checkpoint_dir, start_layer
        self.dtype, self.device = dtype, torch.device(device)
        self.base = None if checkpoint_dir is None else base_fingerprint(checkpoint_dir)
        self.gate_count = (config.n_layer - start_layer) * config.n_head
        self.slots: dict[str, Slot] = {}
        self.blocks: defaultdict[int, list[Block]] = defaultdict(list)  # by prefix length
        self.free: defaultdict[int, list[tuple[Block, int]]] = defaultdict(list)  # rows of removed adapters, by length

    def __contains__(self, name: str) -> bool:
        return name in self.slots

    def __len__(self) -> int:
        return len(self.slots)

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of all prefixes and gates, without names."""
        return sum(b.used * b.data.size(1) * b.data.itemsize for blocks in self.blocks.values() for b in blocks)

    def add(self, name: str, adapter: AdapterFile) -> None:
        """Copy an adapter into the bank.

        Raises:
            UserError: The name is taken, or the adapter is not an Aligner, belongs to another base, or starts below
                `start_layer`.
        """
        if name in self.slots or name in ("", BASE):
            raise UserError(f"The name {name!r} is taken; choose another one, or swap the adapter.")
        self._store(name, adapter)

    def swap(self, name: str, adapter: AdapterFile) -> None:
        """Replace the adapter of a name.

        Raises:
            UserError: As in `add`, or there is no such name; the bank is then unchanged.
        """
        self._store(name, adapter, self.slot(name))

    def remove(self, name: str) -> None:
        """Remove an adapter; its memory is reused.

        Raises:
            UserError: There is no such name.
        """
        self._release(self.slot(name))
        del self.slots[name]

    def adapter(self, name: str) -> AdapterFile:
        """Return an adapter as `read_adapter` does, with gates from the bank's `start_layer` up.

        Raises:
            UserError: There is no such name.
        """
        slot = self.slot(name)
        ((_, prefixes, gates),) = self.gather([name])
        state = {"global_value_embedding.weight": prefixes[0]}
        for layer, layer_gates in enumerate(gates[0], self.start_layer):
            state[f"transformer.h.{layer}.attn.gating_factor"] = layer_gates.view(1, -1, 1, 1)
        config = {"adapter_prompt_length": slot.block.length, "adapter_start_layer": self.start_layer}
        meta = {"method": "aligner", "config": config, "prompt_style": slot.style}
        return AdapterFile(state, meta | ({"base": self.base} if self.base else {}), Path(name))

    def slot(self, name: str) -> Slot:
        """Return where an adapter is stored.

        Raises:
            UserError: There is no such name; the message lists similar ones.
        """
        if name not in self.slots:
            # comparing all of a million names takes too long: only those with the longest common beginning
            alike = heapq.nlargest(1000, self.slots, key=lambda other: len(os.path.commonprefix([name, other])))  # noqa: RUF071
            near = get_close_matches(name, alike, 3)
            hint = f"; {'near ones' if near else 'some'} are {', '.join(map(repr, near or alike[:3]))}" if alike else ""
            raise UserError(f"There is no adapter named {name!r} among the {len(self)} of the bank{hint}.")
        return self.slots[name]

    def style(self, name: str) -> str:
        """Return the prompt style that an adapter was trained with.

        Raises:
            UserError: There is no such name.
        """
        return self.slot(name).style

    def gather(self, names: Sequence[str]) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Return prefixes and gates in fp32, grouped by prefix length N in ascending order.

        Returns:
            For each length, the indices of its adapters in `names`, prefixes (n, N, C) and gates (n, layers, nh).

        Raises:
            UserError: There is no such name.
        """
        slots, members = [self.slot(name) for name in names], defaultdict(list)
        for i, slot in enumerate(slots):
            members[slot.block.length].append(i)
        gathered = []
        for length, indices in sorted(members.items()):
            packed = torch.stack([slots[i].block.data[slots[i].row] for i in indices]).float()
            prefixes, gates = packed.split([length * self.config.n_embd, self.gate_count], dim=1)
            prefixes, gates = prefixes.unflatten(1, (length, -1)), gates.unflatten(1, (-1, self.config.n_head))
            gathered.append((indices, prefixes, gates))
        return gathered

    def _pack(self, adapter: AdapterFile) -> torch.Tensor:
        """Check an adapter and return its prefix and gates side by side, (N·C + layers·nh,)."""
        config = self.config
        if adapter.method != "aligner":
            raise UserError(f"{adapter.path} was made by the method {adapter.method!r}; a bank holds Aligners.")
        if self.base is not None and adapter.meta.get("base") != self.base:
            check_base(adapter, self.checkpoint_dir, config)
        start, state = adapter.config["adapter_start_layer"], without_aliases(adapter.state)
        if start < self.start_layer:
            raise UserError(f"{adapter.path} starts at layer {start}, below the bank's start layer {self.start_layer}.")
        shapes = {"global_value_embedding.weight": (adapter.config["adapter_prompt_length"], config.n_embd)}
        for layer in range(start, config.n_layer):
            shapes[f"transformer.h.{layer}.attn.gating_factor"] = (1, config.n_head, 1, 1)
        found = {name: tuple(t.shape) for name, t in state.items()}
        for name in sorted(shapes.keys() | found.keys()):
            has, needs = found.get(name, "missing"), shapes.get(name, "nothing")
            if has != needs:
                raise UserError(f"{adapter.path} does not fit the bank's base: {name} is {has}, not {needs}.")
        zero_gates = torch.zeros((start - self.start_layer) * config.n_head)
        prefix, *gates = (state[name].detach().flatten().float().cpu() for name in shapes)
        return torch.cat([prefix, zero_gates, *gates])

    def _store(self, name: str, adapter: AdapterFile, old: Slot | None = None) -> None:
        packed = self._pack(adapter)
        if old is not None:
            self._release(old)  # an adapter of the same length takes its row
        block, row = self._allocate(adapter.config["adapter_prompt_length"])
        block.data[row] = packed
        self.slots[name] = Slot(block, row, sys.intern(adapter.meta.get("prompt_style") or "alpaca"))

    def _allocate(self, length: int) -> tuple[Block, int]:
        if self.free[length]:
            return self.free[length].pop()
        blocks = self.blocks[length]
        if not blocks or blocks[-1].used == len(blocks[-1].data):
            width = length * self.config.n_embd + self.gate_count
            n_rows = max(1, BLOCK_BYTES // (width * self.dtype.itemsize))
            blocks.append(Block(length, torch.empty(n_rows, width, dtype=self.dtype, device=self.device)))
        blocks[-1].used += 1
        return blocks[-1], blocks[-1].used - 1

    def _release(self, slot: Slot) -> None:
        self.free[slot.block.length].append((slot.block, slot.row))

    def save(self, path: Path, overwrite: bool = False) -> None:
        """Write all adapters and names into one safetensors file; see the top of this module for its format.

        A file that is not a bank is replaced only with `overwrite`.
        """
        members: defaultdict[int, list[tuple[int, str, Slot]]] = defaultdict(list)
        for name, slot in self.slots.items():
            members[id(slot.block)].append((slot.row, name, slot))
        tensors, lengths = {}, []
        for i, stored in enumerate(members.values()):
            stored.sort()
            rows, block = [row for row, _, _ in stored], stored[0][2].block
            without_gaps = rows == list(range(len(rows)))  # then a view suffices
            names = json.dumps([(name, slot.style) for _, name, slot in stored]).encode()
            tensors[f"adapters.{i}"] = (block.data[: len(rows)] if without_gaps else block.data[rows]).cpu()
            tensors[f"names.{i}"] = torch.frombuffer(bytearray(names), dtype=torch.uint8)
            lengths.append(block.length)
        meta = {"config": json.loads(self.config.to_json()), "start_layer": self.start_layer, "base": self.base}
        with atomic_write(path, overwrite=overwrite or is_ours(path, META_KEY)) as temporary:
            save_file(tensors, temporary, metadata={META_KEY: json.dumps({**meta, "lengths": lengths})})

    @classmethod
    def load(cls, path: Path, checkpoint_dir: Path | None = None, *, device: torch.device | str = "cpu") -> "Bank":
        """Open a file that `save` wrote.

        On a CPU the file is memory-mapped: an adapter is read when it is first used, and the file must not change
        while the bank is in use. Changes to the bank do not change the file.

        Raises:
            UserError: There is no such file, it is not a bank, or it belongs to another base.
        """
        path = Path(path)
        meta = bank_header(path)
        if meta is None:
            raise UserError(f"{path} is not a bank of adapters.")
        config = LLaMAConfig(**meta["config"])
        if checkpoint_dir is not None and meta["base"] is not None:
            check_base(AdapterFile({}, {"base": meta["base"]}, path), checkpoint_dir, config)
        elif checkpoint_dir is not None and config != LLaMAConfig.from_json(Path(checkpoint_dir) / CONFIG_NAME):
            raise UserError(f"{path} is a bank for a base of another shape than {checkpoint_dir}.")
        bank = cls(config, checkpoint_dir, start_layer=meta["start_layer"], device=device)
        with safe_open(path, framework="pt") as file:
            for i, length in enumerate(meta["lengths"]):
                data = file.get_tensor(f"adapters.{i}").to(bank.device)
                bank.dtype, block = data.dtype, Block(length, data, len(data))
                bank.blocks[length].append(block)
                names = json.loads(file.get_tensor(f"names.{i}").numpy().tobytes())
                for row, (name, style) in enumerate(names):
                    bank.slots[name] = Slot(block, row, sys.intern(style))
        return bank


def bank_header(path: Path) -> dict[str, Any] | None:
    """Return the header entry of a bank's file, or None for any other file.

    Raises:
        UserError: There is no such file.
    """
    if not path.is_file():
        raise UserError(f"There is no file at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(META_KEY)
    except SafetensorError:
        return None
    return None if header is None else json.loads(header)


def open_bank(paths: Sequence[Path], checkpoint_dir: Path) -> Bank:
    """Return the bank of one bank file, or a bank of adapter files and folders, named after them.

    Raises:
        UserError: A path is neither, an adapter does not belong to the base, or two have one name.
    """
    paths = [Path(path) for path in paths]
    if len(paths) == 1 and paths[0].is_file() and bank_header(paths[0]) is not None:
        bank = Bank.load(paths[0], checkpoint_dir)
        if not bank:
            raise UserError(f"The bank {paths[0]} holds no adapter.")
        return bank
    names = [path.resolve().name if path.is_dir() else path.stem for path in paths]
    return make_bank(checkpoint_dir, [(n, read_adapter(path)) for n, path in zip(names, paths, strict=True)])


def make_bank(checkpoint_dir: Path, adapters: Sequence[tuple[str, AdapterFile]]) -> Bank:
    """Return a bank of named adapters, whose start layer is the lowest of theirs.

    Raises:
        UserError: As in `Bank.add`.
    """
    config = LLaMAConfig.from_json(Path(checkpoint_dir) / CONFIG_NAME)
    starts = [adapter.config.get("adapter_start_layer", config.n_layer - 1) for _, adapter in adapters]
    bank = Bank(config, checkpoint_dir, start_layer=min(starts))
    for name, adapter in adapters:
        bank.add(name, adapter)
    return bank
