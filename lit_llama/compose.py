"""Models whose adapters are weighted sums of Aligners; each row of a batch may have a different sum.

    row 0   (("pirate", 1.0),)                       one Aligner as trained
    row 1   (("pirate", 1.0), ("polite", 0.5))       two, whose contributions add up
    row 2   ()                                       the base model

    a layer's attention in row i:   Attn(q, k, v) + Σ strength · gate × softmax(q·Kᵀ/√hs)·V    over the sum of row i

Strengths multiply the gates. When a batch begins, each layer projects the prefixes of the batch, each once; the most
recently used projections, up to `PROJECTED_BYTES`, are cached. For N = 1 a row then adds a constant to each layer.
"""

import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lit_llama.model as llama
from lit_llama.aligner import gated_kv, prefix_attention
from lit_llama.bank import BASE, Bank, Gathered, Slot, make_bank
from lit_llama.checkpoint import AdapterFile, check_base, load_model
from lit_llama.merge import merge_aligners_
from lit_llama.modules import swapped_parameters
from lit_llama.utils import UserError

SCALED = re.compile(r"(.*):(-?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE]-?\d{1,2})?)")  # a name and its strength
MAX_TERMS = 16  # of a sum that a text describes; each takes memory in every layer of a row
PROJECTED_BYTES = 2**28  # of the projected prefixes that a model keeps; one of 10 tokens takes 4.9 MB at 7B in bf16
Sum = tuple[tuple[str, float], ...]  # names in a bank, and their strengths
Row = Sum | str | None  # a name stands for ((name, 1.0),), None for ()


def as_sum(row: Row) -> Sum:
    """Return the weighted sum of a row, without terms of strength 0, which must not change the base by a single bit."""
    terms = ((row, 1.0),) if isinstance(row, str) else row or ()
    return tuple((name, float(strength)) for name, strength in terms if strength)


def parse_sum(text: str, bank: Bank) -> Sum:
    """Return the weighted sum that a text like "polite:0.5+pirate" describes; "base" contributes nothing.

    The strengths of a name that occurs several times are added. A name in the bank may contain `+` and `:` if it is the
    complete text, or all but its strength.

    Raises:
        UserError: A name is not in the bank, its adapter is not finite, or there are more than `MAX_TERMS` terms.
    """
    scaled = SCALED.fullmatch(text)
    is_one = text in bank or (scaled is not None and scaled[1] in bank)
    strengths, parts = {}, [text] if is_one else text.split("+")
    if len(parts) > MAX_TERMS:
        raise UserError(f"The sum has {len(parts):,} terms; use at most {MAX_TERMS}.")
    for part in parts:
        scaled = None if part in bank else SCALED.fullmatch(part)
        name, strength = (scaled[1], float(scaled[2])) if scaled else (part, 1.0)
        if name != BASE:
            bank.check(name)
            strengths[name] = strengths.get(name, 0.0) + strength
    return tuple(strengths.items())


class Term(NamedTuple):
    """The keys and values that prefixes of one length N add to one layer's attention, in some rows of a batch.

    Args:
        keys, values: (n, nh, N, hs) from `gated_kv`.
        rows: (n,) the row of the batch that each prefix belongs to; a row may occur several times. None: prefix i
            belongs to row i, or, for n = 1, all rows share the prefix.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor | None


class Projected(NamedTuple):
    """The projections of a prefix in the layers from the bank's start layer up.

    Args:
        slot: the slot of its adapter in the bank; a swap replaces it with another object.
        keys, values: (layers, ng, N, hs) from `keys_values`. For N = 1 no keys are needed, so `keys` is `values`.
    """

    slot: Slot
    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes * (1 if self.keys is self.values else 2)


class LastUsed(OrderedDict[str, Projected]):
    """A cache of the most recently used projected prefixes, by their names in a bank, up to `PROJECTED_BYTES`."""

    nbytes = 0

    def use(self, name: str, slot: Slot) -> Projected | None:
        """Return the projected prefix of a name, None if it is not cached or its adapter was swapped."""
        if name not in self:
            return None
        self.move_to_end(name)
        return self[name] if self[name].slot is slot else None

    def keep(self, name: str, projected: Projected) -> None:
        if name in self:
            self.nbytes -= self.pop(name).nbytes
        self[name] = projected
        self.nbytes += projected.nbytes
        while self.nbytes > PROJECTED_BYTES:
            self.nbytes -= self.popitem(last=False)[1].nbytes


class CausalSelfAttention(llama.CausalSelfAttention):
    """Causal self-attention plus each row's terms."""

    terms: Sequence[Term] = ()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        y = super().attend(q, k, v, mask)
        q = q.to(k.dtype)
        for keys, values, rows in self.terms:
            if rows is None:
                y = y + prefix_attention(q, keys, values)
            else:
                added = prefix_attention(q[rows], keys, values)  # (n, nh, T or 1, hs)
                y = y.index_add(0, rows, added.expand(-1, -1, q.size(2), -1))
        return y


class LLaMA(llama.LLaMA):
    """LLaMA with a bank of Aligners: the base model, until `use` or `using` assigns a weighted sum to each row.

    Args:
        bank: set by `load_with_bank`.
        sums: the weighted sum of each row; a single one is for batches of any size.
    """

    bank: Bank
    sums: Sequence[Sum] = ((),)

    def __init__(self, config: llama.LLaMAConfig) -> None:
        super().__init__(config)
        self.projected = LastUsed()

    @staticmethod
    def make_attention(config: llama.LLaMAConfig, layer: int) -> CausalSelfAttention:
        return CausalSelfAttention(config)

    def use(self, rows: Sequence[Row], gathered: Sequence[Gathered] | None = None) -> None:
        """Assign a weighted sum to each row of the following batches; a single one is for batches of any size.

        This is for inference: no gradients reach the adapters. Later changes to the bank have no effect on these rows.

        Args:
            gathered: the adapters of the rows, from `Bank.gather`; if None, no thread may change the bank meanwhile.

        Raises:
            UserError: A name is not in the bank; the rows are then unchanged.
        """
        sums = [as_sum(row) for row in rows]
        gathered = self.bank.gather([name for terms in sums for name, _ in terms]) if gathered is None else gathered
        self._assign(sums, self._terms(sums if len(set(sums)) > 1 else sums[:1], gathered))

    @contextmanager
    def using(self, rows: Sequence[Row], gathered: Sequence[Gathered] | None = None) -> Iterator[None]:
        """Call `use` temporarily."""
        with self._restored():
            self.use(rows, gathered)
            yield

    @contextmanager
    def selecting(self, rows: list[int]) -> Iterator[None]:
        selected = torch.tensor(rows, device=self.transformer.wte.weight.device)
        sums = self.sums if len(self.sums) == 1 else [self.sums[row] for row in rows]
        matches: dict[int, tuple[Tensor, ...]] = {}  # by id of a term's rows, which its layers share

        def select(term: Term) -> Term:
            if term.rows is None:
                return term if len(term.values) == 1 else Term(term.keys[selected], term.values[selected], None)
            if id(term.rows) not in matches:
                matches[id(term.rows)] = (selected.unsqueeze(1) == term.rows).nonzero(as_tuple=True)
            places, which = matches[id(term.rows)]
            return Term(term.keys[which], term.values[which], places)

        with self._restored() as terms:
            self._assign(sums, [[select(term) for term in layer_terms] for layer_terms in terms])
            yield

    def adapters_of_rows(self, count: int) -> Sequence[Sum]:
        self._check_count(count)
        return [self.sums[0]] * count if len(self.sums) == 1 else self.sums

    def _check_count(self, count: int) -> None:
        if len(self.sums) not in (1, count):
            raise UserError(f"There are adapters for {len(self.sums)} rows, and the batch has {count}.")

    @contextmanager
    def _restored(self) -> Iterator[list[Sequence[Term]]]:
        """Yield each layer's terms, and restore them and the sums at the end."""
        sums, terms = self.sums, [block.attn.terms for block in self.transformer.h]
        try:
            yield terms
        finally:
            self._assign(sums, terms)

    def _assign(self, sums: Sequence[Sum], terms: Sequence[Sequence[Term]]) -> None:
        self.sums = sums
        for block, layer_terms in zip(self.transformer.h, terms, strict=True):
            block.attn.terms = layer_terms

    @torch.no_grad()
    def _terms(self, sums: Sequence[Sum], gathered: Sequence[Gathered]) -> list[list[Term]]:
        """Return each layer's terms for a batch with these sums of adapters."""
        device = self.transformer.wte.weight.device
        layers: list[list[Term]] = [[] for _ in self.transformer.h]
        for names, slots, prefixes, gates in gathered:
            place = {name: n for n, name in enumerate(names)}
            keys, values = self._project(names, slots, prefixes)
            used = [(place[name], strength, row) for row, terms in enumerate(sums) for name, strength in terms
                    if name in place]  # fmt: skip
            in_order = [row for _, _, row in used] == list(range(len(sums)))
            which, strengths, rows = (torch.tensor(column, device=gates.device) for column in zip(*used, strict=True))
            gates = (strengths[:, None, None] * gates[which]).to(device)  # (n, layers, nh)
            which, rows = which.to(device), None if in_order else rows.to(device)
            for i, layer_gates in enumerate(gates.unbind(1)):
                k, v = gated_kv(keys[i][which], values[i][which], layer_gates[:, :, None, None])  # (n, nh, N, hs)
                added = layers[self.bank.start_layer + i]
                if len(sums) == 1:  # for batches of any size
                    added += [Term(*pair, None) for pair in zip(k.split(1), v.split(1), strict=True)]
                else:
                    added.append(Term(k, v, rows))
        return layers

    def _project(self, names: list[str], slots: list[Slot], prefixes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of m prefixes (m, N, C) in each layer, (layers, m, ng, N, hs) both."""
        batch = {name: self.projected.use(name, slot) for name, slot in zip(names, slots, strict=True)}
        new = [i for i, name in enumerate(names) if batch[name] is None]
        if new:
            x = prefixes[new].to(self.transformer.wte.weight)
            pairs = [block.attn.keys_values(x) for block in self.transformer.h[self.bank.start_layer :]]
            for i, *pair in zip(new, *(torch.stack(t, 1) for t in zip(*pairs, strict=True)), strict=True):
                values = pair[1].clone()
                keys = values if values.size(2) == 1 else pair[0].clone()
                batch[names[i]] = Projected(slots[i], keys, values)
                self.projected.keep(names[i], batch[names[i]])
        values = torch.stack([projected.values for projected in batch.values()], 1)
        if values.size(3) == 1:
            return values, values
        return torch.stack([projected.keys for projected in batch.values()], 1), values

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Raise the error that `use` would raise for unknown names."""
        for row in rows:
            for name, _ in as_sum(row):
                self.bank[name]

    def run_blocks(self, x: Tensor, *args: Any) -> Tensor:
        self._check_count(len(x))
        return super().run_blocks(x, *args)


def load_with_bank(
    checkpoint_dir: Path, bank: Bank, row: Row = None, *, merge: bool = False, **options: Any
) -> llama.LLaMA:
    """Load a base in which each row of a batch may use a different weighted sum of a bank's Aligners.

    Args:
        row: the sum of all rows until `LLaMA.use` changes it.
        merge: return a plain LLaMA if all prefixes of `row` have one token: it computes the same function at the
            base's speed, but its adapters can no longer be scaled or swapped.
        options: device, dtype and quantize of `load_model`.

    Raises:
        UserError: As `load_model`, the bank is for another base, or a name is not in the bank.
    """
    if options.get("mesh") is not None:
        raise UserError(
            "Several Aligners or a bank need the complete base; with --devices, use --adapter with a single one."
        )
    terms = as_sum(row)
    merge = merge and all(group.prefixes.size(1) == 1 for group in bank.gather([name for name, _ in terms]))
    model = load_model(checkpoint_dir, method=None if merge else LLaMA, **options)
    if model.config != bank.config:
        raise UserError(f"The bank is for a base of another shape than {checkpoint_dir}.")
    if bank and bank.checkpoint_dir != checkpoint_dir:  # otherwise its adapters have been checked
        check_base(bank.adapter(next(iter(bank))), checkpoint_dir, model.config)
    if merge:
        merge_aligners_(model, [(bank.adapter(name).state, strength) for name, strength in terms])
    else:
        model.bank = bank
        model.use([terms])
    return model


def load_adapted(
    checkpoint_dir: Path,
    adapters: Sequence[AdapterFile],
    strengths: Sequence[float] = (1.0,),
    *,
    merge: bool = True,
    **options: Any,
) -> llama.LLaMA:
    """Load a base with one adapter of any method, or with a weighted sum of Aligners of any lengths and start layers.

    Args:
        adapters: trained on this base.
        strengths: strength of each adapter (see its method's `scaled_parameter`); a single one is for all.
        merge, options: see `load_with_bank`.

    Raises:
        UserError: The numbers of adapters and strengths differ, an adapter belongs to another base, or a method does
            not support a strength.
    """
    if len(strengths) not in (1, len(adapters)):
        raise UserError(f"There are {len(adapters)} adapters and {len(strengths)} strengths; give each its own.")
    foreign = [adapter for adapter in adapters if adapter.method != "aligner"]
    if foreign and len(adapters) > 1:
        raise UserError(f"{foreign[0].path} was made by the method {foreign[0].method!r}; only Aligners add up.")
    if foreign or (len(adapters) == 1 and options.get("mesh") is not None):  # nothing is merged into a sharded base
        model = load_model(checkpoint_dir, adapters[0], **options)
        for name, p in model.adapter_parameters().items():
            p.data = model.scaled_parameter(name, p.data, strengths[0])
        return model
    names = [str(i) for i in range(len(adapters))]
    bank = make_bank(checkpoint_dir, list(zip(names, adapters, strict=True)))
    row = tuple(zip(names, [*strengths] * len(names), strict=False))  # a single strength is repeated
    return load_with_bank(checkpoint_dir, bank, row, merge=merge, **options)


def scaled_adapter(model: llama.LLaMA, strength: float) -> AbstractContextManager:
    """Temporarily scale a model's adapter: 0 gives the base model bit for bit, 1 the adapter as it is.

    It scales the gates, LoRA's B or BitFit's biases; see each method's `scaled_parameter`.

    Raises:
        UserError: The method does not support this strength.
        ValueError: The model has no adapter, or it is merged into the base.
    """
    if isinstance(model, LLaMA):
        return model.using([tuple((name, s * strength) for name, s in terms) for terms in model.sums])
    adapter = model.adapter_parameters()
    if not adapter:
        raise ValueError("The model has no adapter that could be scaled; see `merge` of load_adapted.")
    return swapped_parameters(model, {n: model.scaled_parameter(n, p.data, strength) for n, p in adapter.items()})
