"""state.pt: the state that a run is resumed from. It is checked completely before it is used."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch

from lit_llama.storage.schema import check, field, unreadable
from lit_llama.utils import UserError

Tensors = dict[str, torch.Tensor]


def read_saved_state(path: Path) -> dict[str, Any]:
    """Return the content of a state.pt, with the types of its fields checked.

    Raises:
        UserError: The file cannot be read, or is damaged.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise unreadable(path, error) from None
    except Exception:  # unpickling raises many types
        raise UserError(f"{path} is damaged; start again with --overwrite.") from None
    try:
        check(state, dict, "It")
        for name, kind in (("step", int), ("tokens", int), ("seconds", float)):
            field(state, name, kind, "It", least=0, most=2**53)
        for name in ("settings", "identity"):
            field(state, name, str, "It")
        _check_val_losses(field(state, "val_losses", list, "It"), state["step"])
    except UserError as error:
        raise damaged(path, error) from None
    return state


def check_saved_state(
    path: Path, state: dict[str, Any], adapter: Tensors, optimizers: list[torch.optim.Optimizer]
) -> None:
    """Check that the tensors of a saved state fit the adapter and the optimizers.

    Raises:
        UserError: One is missing, has another shape or dtype, or is not finite.
    """
    try:
        _check_tensors(state.get("adapter"), adapter, "adapter")
        if state.get("best"):  # earlier versions have none
            _check_tensors(state["best"], adapter, "best")
        saved = field(state, "optimizers", list, "It")
        if len(saved) != len(optimizers):
            raise UserError(f"It is for {len(saved)} optimizers instead of {len(optimizers)}.")
        for i, (entry, optimizer) in enumerate(zip(saved, optimizers, strict=True)):
            slots = field(check(entry, dict, f"It: optimizers[{i}]"), "state", dict, f"It: optimizers[{i}]")
            expected = slots_of(optimizer) if state["step"] else {}
            # a parameter that never received a gradient has none
            if not slots.keys() <= expected.keys() or (expected and not slots):
                raise UserError(f"optimizers[{i}] is for other parameters.")
            for parameter, tensors in slots.items():
                _check_tensors(tensors, expected[parameter], f"optimizers[{i}], parameter {parameter}")
    except UserError as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: UserError) -> UserError:
    return UserError(f"{path} is damaged ({str(error).rstrip('.')}); start again with --overwrite.")


def best_of(val_losses: list[tuple[int, float]]) -> tuple[int, float]:
    """Return the step and the value of the lowest validation loss; the latest step if several are equal."""
    return min(reversed(val_losses), key=lambda pair: pair[1])


def slots_of(optimizer: torch.optim.Optimizer) -> dict[int, Tensors]:
    """Return, by parameter index, tensors of the shapes and dtypes that an optimizer stores after its first step."""
    twin = copy.deepcopy(getattr(optimizer, "optimizer", optimizer))  # Fabric wraps optimizers
    for parameter in (p for group in twin.param_groups for p in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
    twin.step()
    return twin.state_dict()["state"]


def agrees(then: Any, now: Any) -> bool:
    """Return whether a recorded value equals the current one; a recorded object may lack fields at any depth."""
    if isinstance(then, dict) and isinstance(now, dict):
        return all(name in now and agrees(value, now[name]) for name, value in then.items())
    return then == now


def as_json(value: dict[str, Any]) -> dict[str, Any]:
    """Return a copy in which values that JSON cannot represent, such as paths, are text."""
    return json.loads(json.dumps(value, default=str))


def _check_val_losses(val_losses: list[Any], last_step: int) -> None:
    before = -1
    for pair in val_losses:
        fits = isinstance(pair, tuple | list) and list(map(type, pair)) == [int, float]
        if not fits or not before < pair[0] <= last_step or not math.isfinite(pair[1]):
            raise UserError("its val_losses are not pairs of a step and a loss, step by step")
        before = pair[0]
    if not val_losses:
        raise UserError("it has no val_losses")


def _check_tensors(tensors: Any, expected: Tensors, what: str) -> None:
    """Check that tensors have the names, shapes and dtypes of `expected`, and finite values."""
    if not isinstance(tensors, dict) or tensors.keys() != expected.keys():
        raise UserError(f"{what} must have the entries {', '.join(map(str, expected)) or '(none)'}")
    for name, tensor in expected.items():
        value = tensors[name]
        kind = (tensor.shape, tensor.dtype, torch.strided)
        if not isinstance(value, torch.Tensor) or (value.shape, value.dtype, value.layout) != kind:
            raise UserError(f"{what}: {name} is not a tensor of shape {tuple(tensor.shape)} and {tensor.dtype}")
        if not value.isfinite().all():
            raise UserError(f"{what}: {name} is not finite")
