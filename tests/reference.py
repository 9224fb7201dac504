"""A plain reference implementation of LLaMA with the Aligner's term, to compare the package's model with.

It uses the tensors of a state dict in fp64, loops over heads, softmax as a quotient of exponentials, and rotary
embeddings as complex numbers, but no code of the package's model. Its gradients can be compared too.

    y = softmax(q·Kᵀ/√hs + causal)·V + gate · softmax(q·K_pᵀ/√hs)·V_p,   K_p, V_p = rows of c_attn × prefix + bias

K_p is normalized by the layer's key norm, if there is one, and is not rotated.
"""

import math
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


def double(state: Tensors, trainable: tuple[str, ...] = ()) -> Tensors:
    """Return an fp64 copy of a state dict, in which the tensors named in `trainable` require gradients."""
    copy = {name: t.detach().clone().double() for name, t in state.items()}
    for name in trainable:
        copy[name].requires_grad_()
    return copy


def frequencies(config: Any) -> list[float]:
    """Return the radians per position of each pair of dimensions, by the published formulas."""
    base = [config.rope_base ** (-2 * i / config.head_size) for i in range(config.head_size // 2)]
    scaling = config.rope_scaling
    if scaling is None:
        return base
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return [f / factor for f in base]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    scaled = []
    for f in base:
        wavelength = 2 * math.pi / f
        if wavelength < context / high:
            scaled.append(f)
        elif wavelength > context / low:
            scaled.append(f / factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * f / factor + smooth * f)
    return scaled


def rotate(x: torch.Tensor, config: Any) -> torch.Tensor:
    """Rotate (T, hs): each pair (x[2i], x[2i+1]), a complex number, is multiplied by exp(i · position · frequency)."""
    angles = torch.outer(torch.arange(len(x), dtype=torch.float64), torch.tensor(frequencies(config)).double())
    pairs = torch.complex(x[:, 0::2], x[:, 1::2]) * torch.exp(1j * angles)
    return torch.stack([pairs.real, pairs.imag], dim=-1).reshape(x.shape)


def softmax(scores: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return weights / weights.sum(dim=-1, keepdim=True)


def norm(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * scale


def linear(x: torch.Tensor, state: Tensors, name: str) -> torch.Tensor:
    y = torch.einsum("ti,oi->to", x, state[f"{name}.weight"])
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def heads(x: torch.Tensor, first: int, count: int, size: int) -> list[torch.Tensor]:
    """Return `count` adjacent slices of `size` columns, starting at column `first`."""
    return [x[:, first + i * size : first + (i + 1) * size] for i in range(count)]


def normed(each: list[torch.Tensor], state: Tensors, name: str, config: Any) -> list[torch.Tensor]:
    """Normalize each head (T, hs) separately, if the layer has this norm."""
    scale = state.get(f"{name}.scale")
    return each if scale is None else [norm(x, scale, config.norm_eps) for x in each]


def attention(x: torch.Tensor, state: Tensors, layer: int, config: Any) -> torch.Tensor:
    """Map (T, C) to (T, C), with attention to the prefix if this layer has a gate."""
    name, T, hs = f"transformer.h.{layer}.attn", len(x), config.head_size
    nh, ng = config.n_head, config.n_kv_head
    qkv = linear(x, state, f"{name}.c_attn")
    queries = normed(heads(qkv, 0, nh, hs), state, f"{name}.q_norm", config)
    keys = normed(heads(qkv, nh * hs, ng, hs), state, f"{name}.k_norm", config)
    if layer not in (config.nope_layers or ()):
        queries, keys = ([rotate(x, config) for x in vectors] for vectors in (queries, keys))
    values = heads(qkv, (nh + ng) * hs, ng, hs)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    gate = state.get(f"{name}.gating_factor")
    if gate is not None:
        prefix = state.get(f"{name}.adapter_wte.weight")  # LLaMA-Adapter has one per layer
        prefix_qkv = linear(
            state["global_value_embedding.weight"] if prefix is None else prefix, state, f"{name}.c_attn"
        )
        prefix_keys = normed(heads(prefix_qkv, nh * hs, ng, hs), state, f"{name}.k_norm", config)
        prefix_values = heads(prefix_qkv, (nh + ng) * hs, ng, hs)
    outputs = []
    for head, q in enumerate(queries):
        group = head * ng // nh
        scores = torch.einsum("th,sh->ts", q, keys[group]) / math.sqrt(hs)
        y = softmax(scores.masked_fill(future, -math.inf)) @ values[group]
        if gate is not None:
            scores = torch.einsum("th,ph->tp", q, prefix_keys[group]) / math.sqrt(hs)
            y = y + gate[0, head, 0, 0] * (softmax(scores) @ prefix_values[group])
        outputs.append(y)
    return linear(torch.cat(outputs, dim=-1), state, f"{name}.c_proj")


def logits(state: Tensors, config: Any, ids: list[int]) -> torch.Tensor:
    """Return the logits (T, V) of one sequence."""
    x = state["transformer.wte.weight"][torch.tensor(ids)]
    for layer in range(config.n_layer):
        name = f"transformer.h.{layer}"
        x = x + attention(norm(x, state[f"{name}.rms_1.scale"], config.norm_eps), state, layer, config)
        h = norm(x, state[f"{name}.rms_2.scale"], config.norm_eps)
        gate = linear(h, state, f"{name}.mlp.c_fc1")
        h = gate / (1 + torch.exp(-gate)) * linear(h, state, f"{name}.mlp.c_fc2")
        x = x + linear(h, state, f"{name}.mlp.c_proj")
    x = norm(x, state["transformer.ln_f.scale"], config.norm_eps)
    head = state["transformer.wte.weight"] if config.tie_embeddings else state["lm_head.weight"]
    return torch.einsum("tc,vc->tv", x, head)


def logps(state: Tensors, config: Any, ids: list[int], labels: list[int]) -> list[torch.Tensor]:
    """Return the log-probability of each label that is not -1, given the tokens before it."""
    scores = logits(state, config, ids)
    return [
        torch.log(softmax(scores[t - 1]))[labels[t]] for t in range(1, len(ids)) if labels[t] != -1
    ]  # nothing predicts the first token


def greedy(state: Tensors, config: Any, ids: list[int], n_new: int) -> list[int]:
    """Return the new tokens of greedy decoding, recomputing the full sequence for each."""
    sequence = list(ids)
    for _ in range(n_new):
        sequence.append(int(logits(state, config, sequence)[-1].argmax()))
    return sequence[len(ids) :]
