"""Many Aligners beside one base: a bank of them by name, and a model whose batch may hold another one in each row.

    rows     "pirate"   "polite"   None   "pirate"                one frozen base, one batch
    N = 1    Attn(q, k, v) + [gate·V_pirate, gate·V_polite, 0, gate·V_pirate]      a constant per row and layer
    N > 1    Attn(q, k, v) + gate_row × softmax(q·K_rowᵀ/√hs)·V_row                for the rows of that length

The bank keeps what was trained, prefix and gates, and no projection of them: for one token at 7B that is
4,096 + 30 · 32 = 5,056 numbers, where its values in all layers would be 24 times as many. What a batch needs is
projected when the batch begins, which reads c_attn once, about a quarter of what every decoded token reads.
"""

import heapq
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

import lit_llama.model as llama
from lit_llama.aligner import prefix_kv
from lit_llama.checkpoint import CONFIG_NAME, AdapterFile, base_fingerprint, check_base, load_model, read_adapter
from lit_llama.model import LLaMAConfig
from lit_llama.utils import UserError, atomic_write
from lit_llama.variant import without_aliases

BLOCK_BYTES = 2**26  # memory is taken in such pieces, so that a bank grows without copying itself
META_KEY = "lit_llama_bank"  # the header entry of a bank's file
BASE = "base"  # what a row without an adapter is called where only text will do


class Slot(NamedTuple):
    """Where an adapter is, and the prompt style it was trained with."""

    block: int
    row: int
    style: str


@dataclass
class Block:
    """Adapters of one length, one per row: prefix (N·C) and gates ((n_layer - start_layer)·nh), side by side."""

    length: int
    data: torch.Tensor
    used: int = 0  # rows beyond were never given out


class Bank:
    """Aligners of one base, of any lengths, held in memory and addressed by name.

    `name in bank`, `len(bank)` and iteration over the names do what they say.

    Args:
        config: of the base.
        checkpoint_dir: the base's folder, to refuse adapters of another one; None takes all of this shape.
        start_layer: no adapter may begin below; one that begins above has closed gates up to there.
        dtype: fp32 gives back what was added bit for bit. bf16 takes half: a prefix loses nothing under a bf16 base,
            which reads it in bf16 anyway; gates lose their last digits.
        device: where the numbers are kept; the model takes those of a batch to its own.
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
        self.slots: dict[str, Slot] = {}
        self.blocks: list[Block] = []
        self.free: dict[int, list[tuple[int, int]]] = {}  # length -> (block, row) of what was removed
        self.open: dict[int, int] = {}  # length -> the block that has room

    def __contains__(self, name: str) -> bool:
        return name in self.slots

    def __len__(self) -> int:
        return len(self.slots)

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    @property
    def nbytes(self) -> int:
        """Of all prefixes and gates; the names come on top."""
        return sum(block.used * block.data.size(1) * block.data.itemsize for block in self.blocks)

    def add(self, name: str, adapter: AdapterFile) -> None:
        """Takes a copy of an adapter.

        Raises:
            UserError: the name is taken, or the adapter is no Aligner, of another base, or begins below `start_layer`.
        """
        if name in self.slots or name in ("", BASE):
            raise UserError(f"The name {name!r} is taken; choose another one, or swap the adapter.")
        self._put(name, adapter, None)

    def swap(self, name: str, adapter: AdapterFile) -> None:
        """Puts another adapter under a name.

        Raises:
            UserError: as in `add`, and there is no such name; the bank is then as it was.
        """
        self._put(name, adapter, self.slot(name))

    def remove(self, name: str) -> None:
        """Forgets an adapter; the next one of its length takes its place.

        Raises:
            UserError: there is no such name.
        """
        self._release(self.slot(name))
        del self.slots[name]

    def adapter(self, name: str) -> AdapterFile:
        """An adapter as `read_adapter` would give it, beginning at the bank's `start_layer`.

        Raises:
            UserError: there is no such name.
        """
        slot = self.slot(name)
        block = self.blocks[slot.block]
        prefix, gates = self.unpack(block.data[slot.row : slot.row + 1].clone(), block.length)
        state = {"global_value_embedding.weight": prefix[0]}
        for i, layer_gates in enumerate(gates[0]):
            state[f"transformer.h.{self.start_layer + i}.attn.gating_factor"] = layer_gates.view(1, -1, 1, 1)
        config = {"adapter_prompt_length": block.length, "adapter_start_layer": self.start_layer}
        base = {"base": self.base} if self.base else {}
        return AdapterFile(
            state, {"method": "aligner", "config": config, "prompt_style": slot.style, **base}, Path(name)
        )

    def slot(self, name: str) -> Slot:
        """Where an adapter is.

        Raises:
            UserError: there is no such name; the sentence has near ones.
        """
        slot = self.slots.get(name)
        if slot is None:

            def shared(other: str) -> int:
                return len(os.path.commonprefix([name, other]))  # noqa: RUF071

            alike = heapq.nlargest(1000, self.slots, key=shared)  # a bank may hold a million
            near = get_close_matches(name, alike, 3)
            hint = f"; {'near ones' if near else 'some'} are {', '.join(map(repr, near or alike[:3]))}" if alike else ""
            raise UserError(f"There is no adapter named {name!r} among the {len(self)} of the bank{hint}.")
        return slot

    def style(self, name: str) -> str:
        """The prompt style an adapter was trained with.

        Raises:
            UserError: there is no such name.
        """
        return self.slot(name).style

    def gather(self, names: Sequence[str]) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Prefixes and gates of some adapters: (numbers in `names`, (n, N, C), (n, layers, nh)) for each length N.

        Raises:
            UserError: there is no such name.
        """
        members: dict[int, list[int]] = {}
        slots = [self.slot(name) for name in names]
        for i, slot in enumerate(slots):
            members.setdefault(self.blocks[slot.block].length, []).append(i)
        gathered = []
        for length, rows in sorted(members.items()):
            packed = torch.stack([self.blocks[slots[i].block].data[slots[i].row] for i in rows])
            gathered.append((rows, *self.unpack(packed, length)))
        return gathered

    def pack(self, adapter: AdapterFile) -> torch.Tensor:
        """Prefix and gates, checked and side by side: (N·C + layers·nh,).

        Raises:
            UserError: as in `add`.
        """
        config = self.config
        if adapter.method != "aligner":
            raise UserError(f"{adapter.path} was made by the method {adapter.method!r}; a bank holds Aligners.")
        if self.base is not None and adapter.meta.get("base") != self.base:
            check_base(adapter, self.checkpoint_dir, config)
        start, state = adapter.config["adapter_start_layer"], without_aliases(adapter.state)
        if start < self.start_layer:
            raise UserError(f"{adapter.path} begins at layer {start} and the bank at {self.start_layer}.")
        shapes = {"global_value_embedding.weight": (adapter.config["adapter_prompt_length"], config.n_embd)}
        for layer in range(start, config.n_layer):
            shapes[f"transformer.h.{layer}.attn.gating_factor"] = (1, config.n_head, 1, 1)
        found = {name: tuple(t.shape) for name, t in state.items()}
        for name in sorted(shapes.keys() | found.keys()):
            has, needs = found.get(name, "missing"), shapes.get(name, "nothing")
            if has != needs:
                raise UserError(f"{adapter.path} does not fit the bank's base: {name} is {has}, not {needs}.")
        closed = torch.zeros((start - self.start_layer) * config.n_head)
        prefix, *gates = (state[name].detach().flatten().float().cpu() for name in shapes)
        return torch.cat([prefix, closed, *gates])

    def unpack(self, packed: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, N·C + layers·nh) -> fp32 prefixes (n, N, C) and gates (n, layers, nh)."""
        prefix, gates = packed.float().split([length * self.config.n_embd, self.gate_count], dim=1)
        return prefix.unflatten(1, (length, -1)), gates.unflatten(1, (-1, self.config.n_head))

    @property
    def gate_count(self) -> int:
        """Gates of one adapter."""
        return (self.config.n_layer - self.start_layer) * self.config.n_head

    def _put(self, name: str, adapter: AdapterFile, old: Slot | None) -> None:
        packed = self.pack(adapter)
        length = (len(packed) - self.gate_count) // self.config.n_embd
        if old is not None and self.blocks[old.block].length == length:
            block, row = old.block, old.row
        else:
            block, row = self._take(length)
            if old is not None:
                self._release(old)
        self.blocks[block].data[row] = packed
        self.slots[name] = Slot(block, row, sys.intern(adapter.meta.get("prompt_style") or "alpaca"))

    def _take(self, length: int) -> tuple[int, int]:
        """Block and row of a free place."""
        if self.free.get(length):
            return self.free[length].pop()
        number = self.open.get(length)
        if number is None or self.blocks[number].used == len(self.blocks[number].data):
            width = length * self.config.n_embd + self.gate_count
            rows = max(1, BLOCK_BYTES // (width * self.dtype.itemsize))
            self.open[length] = number = len(self.blocks)
            self.blocks.append(Block(length, torch.empty(rows, width, dtype=self.dtype, device=self.device)))
        self.blocks[number].used += 1
        return number, self.blocks[number].used - 1

    def _release(self, slot: Slot) -> None:
        self.free.setdefault(self.blocks[slot.block].length, []).append((slot.block, slot.row))

    def save(self, path: Path) -> None:
        """Writes all adapters and names as one safetensors file."""
        members: dict[int, list[tuple[int, str, str]]] = {}
        for name, slot in self.slots.items():
            members.setdefault(slot.block, []).append((slot.row, name, slot.style))
        tensors, lengths = {}, []
        for number, found in members.items():
            found.sort()
            block = self.blocks[number]
            rows = [row for row, _, _ in found]
            whole = rows == list(range(len(rows)))  # no copy without holes
            data = block.data[: len(rows)] if whole else block.data[rows]
            text = json.dumps([(name, style) for _, name, style in found]).encode()
            tensors[f"adapters.{len(lengths)}"] = data.cpu()
            tensors[f"names.{len(lengths)}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            lengths.append(block.length)
        meta = {"config": json.loads(self.config.to_json()), "start_layer": self.start_layer, "base": self.base}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={META_KEY: json.dumps({**meta, "lengths": lengths})})

    @classmethod
    def load(cls, path: Path, checkpoint_dir: Path | None = None, *, device: torch.device | str = "cpu") -> "Bank":
        """What `save` wrote. On a CPU the file is mapped: an adapter is read when it is first used.

        Changes of the bank do not change the file, which must stay as it is for as long as the bank is used.

        Raises:
            UserError: no such file, no bank in it, or the bank of another base.
        """
        path = Path(path)
        meta = bank_header(path)
        if meta is None:
            raise UserError(f"{path} is no bank of adapters.")
        config = LLaMAConfig(**meta["config"])
        if checkpoint_dir is not None and meta["base"] is not None:
            check_base(AdapterFile({}, {"base": meta["base"]}, path), checkpoint_dir, config)
        elif checkpoint_dir is not None and config != LLaMAConfig.from_json(Path(checkpoint_dir) / CONFIG_NAME):
            raise UserError(f"{path} is a bank for a base of another shape than {checkpoint_dir}.")
        bank = cls(config, checkpoint_dir, start_layer=meta["start_layer"], device=device)
        with safe_open(path, framework="pt") as file:
            for number, length in enumerate(meta["lengths"]):
                data = file.get_tensor(f"adapters.{number}").to(bank.device)
                bank.dtype = data.dtype
                bank.blocks.append(Block(length, data, len(data)))
                names = json.loads(file.get_tensor(f"names.{number}").numpy().tobytes())
                for row, (name, style) in enumerate(names):
                    bank.slots[name] = Slot(number, row, sys.intern(style))
        return bank


def bank_header(path: Path) -> dict[str, Any] | None:
    """What a bank's file says about itself; None for any other file.

    Raises:
        UserError: no such file.
    """
    if not path.is_file():
        raise UserError(f"There is no file at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(META_KEY)
    except SafetensorError:
        return None
    return None if header is None else json.loads(header)


def open_bank(paths: list[Path], checkpoint_dir: Path) -> Bank:
    """A bank's file, or a bank of adapters' files and folders under their names, exactly as they were trained.

    Raises:
        UserError: a path is neither, an adapter does not belong to the base, or two have one name.
    """
    if len(paths) == 1 and Path(paths[0]).is_file() and bank_header(Path(paths[0])) is not None:
        bank = Bank.load(paths[0], checkpoint_dir)
        if not bank:
            raise UserError(f"The bank {paths[0]} holds no adapter.")
        return bank
    adapters = {path: read_adapter(path) for path in map(Path, paths)}
    config = LLaMAConfig.from_json(Path(checkpoint_dir) / CONFIG_NAME)
    starts = [adapter.config.get("adapter_start_layer", config.n_layer - 1) for adapter in adapters.values()]
    bank = Bank(config, checkpoint_dir, start_layer=min(starts))
    for path, adapter in adapters.items():
        bank.add(path.resolve().name if path.is_dir() else path.stem, adapter)
    return bank


def load_with_bank(
    checkpoint_dir: Path,
    bank: Bank,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantize: str | None = None,
) -> "LLaMA":
    """A base whose rows may each use another adapter of a bank; the arguments are those of `load_model`.

    Raises:
        UserError: as `load_model`, or the bank is for a base of another shape.
    """
    model = load_model(checkpoint_dir, method=LLaMA, device=device, dtype=dtype, quantize=quantize)
    if model.config != bank.config:
        raise UserError(f"The bank is for a base of another shape than {checkpoint_dir}.")
    model.bank = bank
    return model


@dataclass(frozen=True)
class Term:
    """What the rows of a batch with adapters of one length N add to one layer's attention.

    Args:
        rows: (n,) their numbers in the batch; None is all, in order.
        values: (n, nh, N, hs), gated, or for N = 1 (B, nh, 1, hs): the whole term, zero in all other rows.
        keys: (n, nh, N, hs); None for N = 1.
    """

    rows: torch.Tensor | None
    values: torch.Tensor
    keys: torch.Tensor | None = None

    def of_rows(self, selected: torch.Tensor) -> "Term":
        """The same for a batch of these rows (n',) of the whole one."""
        if self.rows is None:
            return Term(None, self.values[selected], None if self.keys is None else self.keys[selected])
        own, place = (self.rows == selected.unsqueeze(1)).nonzero(as_tuple=True)[::-1]
        return Term(place, self.values[own], self.keys[own])

    def add_to(self, y: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """y and q are (B, nh, T, hs)."""
        if self.keys is None:
            return y + self.values
        if self.rows is not None:
            q = q[self.rows]
        term = F.scaled_dot_product_attention(q, self.keys, self.values)
        return y + term if self.rows is None else y.index_add(0, self.rows, term)


class LLaMA(llama.LLaMA):
    """The base, and inside `using` what each row's own adapter adds."""

    bank: Bank | None = None
    batch_size: int | None = None  # inside `using`

    @staticmethod
    def make_attention(config: LLaMAConfig, layer: int) -> "CausalSelfAttention":
        return CausalSelfAttention(config)

    @contextmanager
    def using(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside, row i of a batch is answered with the adapter `names[i]` of the bank, or by the base for None.

        For inference: no gradients reach the adapters. What is swapped or removed meanwhile counts from the next time.

        Raises:
            UserError: there is no such adapter, or, inside, the batch has another number of rows.
        """
        self._set_terms(names)
        try:
            yield
        finally:
            self.batch_size = None
            for block in self.transformer.h:
                block.attn.terms = ()

    @contextmanager
    def selecting(self, rows: list[int]) -> Iterator[None]:
        if self.batch_size is None:  # outside `using`
            yield
            return
        whole = [block.attn.terms for block in self.transformer.h], self.batch_size
        selected = torch.tensor(rows, device=self.transformer.wte.weight.device)
        try:
            self.batch_size = len(rows)
            for block in self.transformer.h:
                block.attn.terms = tuple(term.of_rows(selected) for term in block.attn.terms)
            yield
        finally:
            terms, self.batch_size = whole
            for block, own in zip(self.transformer.h, terms, strict=True):
                block.attn.terms = own

    def run_blocks(
        self, x: torch.Tensor, cache: llama.KVCache | None = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.batch_size not in (None, len(x)):
            raise UserError(f"There are {self.batch_size} names of adapters for a batch of {len(x)} rows.")
        return super().run_blocks(x, cache, positions)

    @torch.no_grad()
    def _set_terms(self, names: Sequence[str | None]) -> None:
        weight = self.transformer.wte.weight
        distinct = list(dict.fromkeys(name for name in names if name is not None))
        gathered = self.bank.gather(distinct)  # an unknown name changes nothing
        self.batch_size = len(names)
        for numbers, prefixes, gates in gathered:
            place = {distinct[number]: i for i, number in enumerate(numbers)}
            rows = [row for row, name in enumerate(names) if name in place]
            which = torch.tensor([place[names[row]] for row in rows], device=weight.device)
            rows = torch.tensor(rows, device=weight.device)
            prefixes, gates = prefixes.to(weight.device, weight.dtype), gates.to(weight.device)
            for block, layer_gates in zip(self.transformer.h[self.bank.start_layer :], gates.unbind(1), strict=True):
                block.attn.terms += (block.attn.term(prefixes, layer_gates, which, rows, len(names)),)


class CausalSelfAttention(llama.CausalSelfAttention):
    """Attention that adds what each row's queries read from that row's own prefix."""

    terms: tuple[Term, ...] = ()

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = super().attend(q, k, v, mask)
        for term in self.terms:
            y = term.add_to(y, q)
        return y

    def term(
        self, prefixes: torch.Tensor, gates: torch.Tensor, which: torch.Tensor, rows: torch.Tensor, batch_size: int
    ) -> Term:
        """Projects the distinct prefixes of one length through this layer, raw and without rotary.

        Args:
            prefixes, gates: (m, N, C) and (m, nh).
            which, rows: (n,) the prefix of each of the rows, and their numbers in the batch.
        """
        keys, values = prefix_kv(self, prefixes, gates.unflatten(1, (-1, 1, 1)))  # (m, nh, N, hs)
        if values.size(2) == 1:
            table = values.new_zeros(batch_size, *values.shape[1:])
            table[rows] = values[which]
            return Term(None, table)

        def by_row(t: torch.Tensor) -> torch.Tensor:
            return t.expand(len(which), *t.shape[1:]) if len(t) == 1 else t[which]

        return Term(None if len(rows) == batch_size else rows, by_row(values), by_row(keys))
