"""Several Aligners on one base: in each layer their gated terms add up.

x ──► frozen layer ──► Attn(q, k, v) + gate_a·softmax(q·K_aᵀ)·V_a + gate_b·softmax(q·K_bᵀ)·V_b + ...
"""

from pathlib import Path

import torch

from lit_llama import aligner
from lit_llama.aligner import LLaMA, Prefix, prefix_attention
from lit_llama.checkpoint import AdapterFile, check_base, load_model
from lit_llama.utils import UserError


def load_composed(
    checkpoint_dir: Path,
    adapters: list[AdapterFile],
    strengths: list[float],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantize: str | None = None,
) -> LLaMA:
    """A base with one adapter of any method, or with several Aligners, each of its own length and start layer.

    Args:
        adapters: trained on this base.
        strengths: how much each adapter counts (`scaled_parameter` of its method); a single one is for all.
        device, dtype, quantize: as in `load_model`.

    Raises:
        UserError: the numbers of adapters and strengths differ, an adapter belongs to another base, or a method knows
            no such strength.
    """
    if len(strengths) == 1:
        strengths = strengths * len(adapters)
    if len(strengths) != len(adapters):
        raise UserError(f"There are {len(adapters)} adapters and {len(strengths)} strengths; give each its own.")
    foreign = [a for a in adapters if a.method != "aligner"]
    if len(adapters) > 1 and foreign:
        raise UserError(f"{foreign[0].path} was made by the method {foreign[0].method!r}; only Aligners add up.")
    # the one that starts lowest makes the layers that the others join
    pairs = zip(adapters, strengths, strict=True)
    (first, strength), *others = sorted(pairs, key=lambda pair: pair[0].config.get("adapter_start_layer", 0))
    model = load_model(checkpoint_dir, first, device=device, dtype=dtype, quantize=quantize)
    for name, p in model.named_parameters():
        if model.is_adapter_parameter(name):
            p.data = model.scaled_parameter(name, p.data, strength)
    for block in model.transformer.h if others else ():
        if isinstance(block.attn, aligner.CausalSelfAttention):
            block.attn.__class__, block.attn.others = CausalSelfAttention, torch.nn.ModuleList()
    for adapter, strength in others:
        check_base(adapter, checkpoint_dir, model.config)
        join(model, adapter, strength)
    return model


def join(model: LLaMA, adapter: AdapterFile, strength: float) -> None:
    """Lets the layers of a model read one more prefix, through gates of its own."""
    device = model.transformer.wte.weight.device
    state = {name: t.float().to(device) for name, t in model.normalize_state_dict(adapter.state).items()}
    values = state["global_value_embedding.weight"]
    prefix = Prefix(*values.shape, _weight=values)
    for layer in range(adapter.config["adapter_start_layer"], model.config.n_layer):
        attn = model.transformer.h[layer].attn
        with torch.device("meta"):
            other = aligner.CausalSelfAttention(model.config)
        other.c_attn, other.c_proj, other.prefix = attn.c_attn, attn.c_proj, [prefix]  # the same frozen weights
        other.gating_factor = torch.nn.Parameter(strength * state[f"transformer.h.{layer}.attn.gating_factor"])
        attn.others.append(other)


class CausalSelfAttention(aligner.CausalSelfAttention):
    """Attention with several Aligners, whose terms add up."""

    others: torch.nn.ModuleList

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = super().attend(q, k, v, mask)
        for other in self.others:
            y = y + prefix_attention(q, *other.constants(q.dtype))
        return y
