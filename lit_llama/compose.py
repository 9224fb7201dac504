"""Models whose adapters are weighted sums of Aligners, another one in each row of a batch if need be.

    row 0   (("pirate", 1.0),)                       one Aligner as trained
    row 1   (("pirate", 1.0), ("polite", 0.5))       two, whose contributions add up
    row 2   ()                                       the base model

    a layer's attention in row i:   Attn(q, k, v) + Σ strength · gate × softmax(q·Kᵀ/√hs)·V    over the sum of row i

Strengths multiply the gates. When a batch begins, each layer projects the batch's distinct prefixes once, which reads
c_attn once, about a quarter of what one decoded token reads. For N = 1 a row then adds a constant to each layer.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lit_llama.model as llama
from lit_llama.aligner import prefix_attention, prefix_kv
from lit_llama.bank import BASE, Bank, make_bank
from lit_llama.checkpoint import AdapterFile, load_model
from lit_llama.merge import merge_aligners_
from lit_llama.modules import swapped_parameters
from lit_llama.utils import UserError

Sum = tuple[tuple[str, float], ...]  # names in a bank, and their strengths
Row = Sum | str | None  # a name stands for ((name, 1.0),), None for ()


def as_sum(row: Row) -> Sum:
    """Return the weighted sum of a row, without terms of strength 0: they must leave the base bit for bit."""
    terms = ((row, 1.0),) if isinstance(row, str) else row or ()
    return tuple((name, float(strength)) for name, strength in terms if strength)


def parse_sum(text: str, bank: Bank) -> Sum:
    """Return the weighted sum that a text like "polite:0.5+pirate" describes; "base" contributes nothing.

    A name in the bank may contain `+` and `:` if it is the complete text.

    Raises:
        UserError: A name is not in the bank.
    """
    terms = []
    for part in [text] if text in bank else text.split("+"):
        name, _, number = part.rpartition(":")
        strength = None if part in bank else finite(number)
        name, strength = (part, 1.0) if strength is None else (name, strength)
        if name != BASE:
            bank.slot(name)
            terms.append((name, strength))
    return tuple(terms)


def finite(text: str) -> float | None:
    """Return the number that a text denotes, None if it does not denote a finite one."""
    try:
        return number if math.isfinite(number := float(text)) else None
    except ValueError:
        return None


@dataclass(frozen=True)
class Term:
    """What rows of a batch with prefixes of one length N add to one layer's attention.

    Args:
        keys, values: (n, nh, N, hs) from `prefix_kv`; n is 1 if all rows share them.
        rows: (n,) row numbers in the batch, a row may occur several times; None means all rows in order.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor | None = None

    def add_to(self, y: Tensor, q: Tensor) -> Tensor:
        """Add the term to attention outputs y (B, nh, T, hs) of queries q (B, nh, T, hs)."""
        if self.rows is None:
            return y + prefix_attention(q, self.keys, self.values)
        return y.index_add(0, self.rows, prefix_attention(q[self.rows], self.keys, self.values))

    def select(self, rows: Tensor) -> "Term":
        """Return the term for a batch of these rows (n',) of the original one."""
        if self.rows is not None:
            places, own = (rows.unsqueeze(1) == self.rows).nonzero(as_tuple=True)
            return Term(self.keys[own], self.values[own], places)
        return self if len(self.values) == 1 else Term(self.keys[rows], self.values[rows])


class CausalSelfAttention(llama.CausalSelfAttention):
    """Attention to the text plus each row's terms."""

    terms: Sequence[Term] = ()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        y = super().attend(q, k, v, mask)
        for term in self.terms:
            y = term.add_to(y, q)
        return y

    def prefix_terms(
        self, prefixes: Tensor, gates: Tensor, which: Tensor, rows: Tensor | None, n_rows: int
    ) -> list[Term]:
        """Return the terms of prefixes of one length N.

        Args:
            prefixes, gates: (m, N, C) and (m, nh).
            which: (n,) for each contribution to the batch, the prefix that it reads.
            rows: (n,) the row that it belongs to; None means that each row has one, in order.
            n_rows: rows of the batch; 1 if its rows all have the same sum, whatever their number.
        """
        keys, values = prefix_kv(self, prefixes, gates[:, :, None, None])
        keys, values = keys[which], values[which]  # (n, nh, N, hs)
        if rows is None:
            return [Term(keys, values)]
        if values.size(2) == 1:  # constants, whose sum is one constant per row
            total = values.new_zeros(n_rows, *values.shape[1:]).index_add_(0, rows, values)
            return [Term(total, total)]
        if n_rows == 1:  # several of one length for all rows
            return [Term(*pair) for pair in zip(keys.split(1), values.split(1), strict=True)]
        return [Term(keys, values, rows)]


class LLaMA(llama.LLaMA):
    """LLaMA with a bank of Aligners: the base model, until `use` or `using` assigns a weighted sum to each row.

    Args:
        bank: set by `load_with_bank`.
        sums: of each row; a single one is for batches of any size.
    """

    bank: Bank
    sums: Sequence[Sum] = ((),)

    @staticmethod
    def make_attention(config: llama.LLaMAConfig, layer: int) -> CausalSelfAttention:
        return CausalSelfAttention(config)

    def use(self, rows: Sequence[Row]) -> None:
        """Assign a weighted sum to each row of the following batches; a single one is for batches of any size.

        This is for inference: no gradients reach the adapters. Later changes of the bank have no effect on it.

        Raises:
            UserError: A name is not in the bank; the rows are then unchanged.
        """
        sums = [as_sum(row) for row in rows]
        self._assign(sums, self._terms(sums if len(set(sums)) > 1 else sums[:1]))

    @contextmanager
    def using(self, rows: Sequence[Row]) -> Iterator[None]:
        """Call `use` temporarily."""
        before = self.sums, [block.attn.terms for block in self.transformer.h]
        self.use(rows)
        try:
            yield
        finally:
            self._assign(*before)

    @contextmanager
    def selecting(self, rows: list[int]) -> Iterator[None]:
        before = self.sums, [block.attn.terms for block in self.transformer.h]
        selected = torch.tensor(rows, device=self.transformer.wte.weight.device)
        sums = self.sums if len(self.sums) == 1 else [self.sums[row] for row in rows]
        self._assign(sums, [[term.select(selected) for term in terms] for terms in before[1]])
        try:
            yield
        finally:
            self._assign(*before)

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Raise an error if `use` would.

        Raises:
            UserError: A name is not in the bank.
        """
        for row in rows:
            for name, _ in as_sum(row):
                self.bank.slot(name)

    def run_blocks(self, x: Tensor, *args: Any) -> Tensor:
        if len(self.sums) not in (1, len(x)):
            raise UserError(f"There are adapters for {len(self.sums)} rows, and the batch has {len(x)}.")
        return super().run_blocks(x, *args)

    def _assign(self, sums: Sequence[Sum], terms: Sequence[Sequence[Term]]) -> None:
        self.sums = sums
        for block, layer_terms in zip(self.transformer.h, terms, strict=True):
            block.attn.terms = layer_terms

    @torch.no_grad()
    def _terms(self, sums: Sequence[Sum]) -> list[list[Term]]:
        """Return each layer's terms for a batch with these sums."""
        weight = self.transformer.wte.weight
        distinct = list(dict.fromkeys(part for terms in sums for part in terms))  # (name, strength) pairs
        layers: list[list[Term]] = [[] for _ in self.transformer.h]
        for indices, prefixes, gates in self.bank.gather([name for name, _ in distinct]):
            strengths = torch.tensor([distinct[i][1] for i in indices], device=gates.device)
            gates = (strengths[:, None, None] * gates).to(weight.device)  # (m, layers, nh)
            place = {distinct[i]: n for n, i in enumerate(indices)}
            pairs = [(place[part], row) for row, terms in enumerate(sums) for part in terms if part in place]
            which, rows = torch.tensor(pairs, device=weight.device).unbind(1)
            rows = None if [row for _, row in pairs] == list(range(len(sums))) else rows
            for layer, layer_gates in enumerate(gates.unbind(1), self.bank.start_layer):
                attn = self.transformer.h[layer].attn
                layers[layer] += attn.prefix_terms(prefixes.to(weight), layer_gates, which, rows, len(sums))
        return layers


def load_with_bank(checkpoint_dir: Path, bank: Bank, **options: Any) -> LLaMA:
    """Load a base whose rows may each use another weighted sum of a bank's Aligners.

    Args:
        options: device, dtype and quantize of `load_model`.

    Raises:
        UserError: As `load_model`, or the bank is for a base of another shape.
    """
    model = load_model(checkpoint_dir, method=LLaMA, **options)
    check_shape(model, bank, checkpoint_dir)
    model.bank = bank
    return model


def load_with_sum(checkpoint_dir: Path, bank: Bank, row: Row, *, merge: bool = True, **options: Any) -> llama.LLaMA:
    """Load a base that answers every row with the same weighted sum of a bank's Aligners.

    Args:
        merge: return a plain LLaMA if all prefixes have one token: it computes the same function at the base's speed,
            but its adapters can no longer be scaled or exchanged.
        options: device, dtype and quantize of `load_model`.

    Raises:
        UserError: As `load_with_bank`, or a name is not in the bank.
    """
    terms = as_sum(row)
    if not merge or any(bank.slot(name).block.length > 1 for name, _ in terms):
        model = load_with_bank(checkpoint_dir, bank, **options)
        model.use([terms])
        return model
    model = load_model(checkpoint_dir, **options)
    check_shape(model, bank, checkpoint_dir)
    merge_aligners_(model, [(bank.adapter(name).state, strength) for name, strength in terms])
    return model


def check_shape(model: llama.LLaMA, bank: Bank, checkpoint_dir: Path) -> None:
    if model.config != bank.config:
        raise UserError(f"The bank is for a base of another shape than {checkpoint_dir}.")


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
        strengths: how much each adapter counts (see its method's `scaled_parameter`); a single one is for all.
        merge, options: see `load_with_sum`.

    Raises:
        UserError: The numbers of adapters and strengths differ, an adapter belongs to another base, or a method does
            not support a strength.
    """
    if len(strengths) not in (1, len(adapters)):
        raise UserError(f"There are {len(adapters)} adapters and {len(strengths)} strengths; give each its own.")
    strengths = strengths * len(adapters) if len(strengths) == 1 else strengths
    foreign = [a for a in adapters if a.method != "aligner"]
    if not foreign:
        names = [str(i) for i in range(len(adapters))]
        bank = make_bank(checkpoint_dir, list(zip(names, adapters, strict=True)))
        return load_with_sum(checkpoint_dir, bank, tuple(zip(names, strengths, strict=True)), merge=merge, **options)
    if len(adapters) > 1:
        raise UserError(f"{foreign[0].path} was made by the method {foreign[0].method!r}; only Aligners add up.")
    model = load_model(checkpoint_dir, adapters[0], **options)
    for name, p in model.named_parameters():
        if model.is_adapter_parameter(name):
            p.data = model.scaled_parameter(name, p.data, strengths[0])
    return model


@contextmanager
def scaled_adapter(model: llama.LLaMA, strength: float) -> Iterator[None]:
    """Temporarily scale a model's adapter: 0 gives the base model bit for bit, 1 the adapter as it is.

    Scaled are gates, LoRA's B or BitFit's biases; see each method's `scaled_parameter`.

    Raises:
        UserError: The method does not support this strength.
        ValueError: The model has no adapter, or it is merged into the base.
    """
    if isinstance(model, LLaMA):
        with model.using([tuple((name, s * strength) for name, s in terms) for terms in model.sums]):
            yield
        return
    adapter = {name: p.data for name, p in model.named_parameters() if model.is_adapter_parameter(name)}
    if not adapter:
        raise ValueError("The model has no adapter that could be scaled; see `merge` of load_adapted.")
    scaled = {name: model.scaled_parameter(name, value, strength) for name, value in adapter.items()}
    with swapped_parameters(model, scaled):
        yield
