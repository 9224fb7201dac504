import math

import pytest
import torch

from lit_llama.run.saved_state import best_of, check_saved_state, read_saved_state
from lit_llama.utils import UserError


@pytest.fixture
def saved():
    """Return the state after one step, the tensors of its adapter, and a new optimizer for them."""
    adapter = {"a": torch.nn.Parameter(torch.ones(2, 3)), "b": torch.nn.Parameter(torch.ones(4))}
    optimizer = torch.optim.AdamW(adapter.values())
    for p in adapter.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    tensors = {name: p.detach() for name, p in adapter.items()}
    state = {"step": 1, "tokens": 5, "seconds": 0.5, "settings": "{}", "identity": "{}",
             "val_losses": [(0, 2.0), (1, 1.0)], "adapter": tensors, "best": tensors,
             "optimizers": [optimizer.state_dict()]}  # fmt: skip
    return state, tensors, torch.optim.AdamW(adapter.values())


def read(path, saved):
    state, adapter, optimizer = saved
    torch.save(state, path)
    check_saved_state(path, read_saved_state(path), adapter, [optimizer])


def test_a_valid_state_is_read(saved, tmp_path):
    read(tmp_path / "state.pt", saved)
    del saved[0]["best"]  # states of earlier versions have none
    read(tmp_path / "state.pt", saved)


def test_a_parameter_without_a_gradient_has_no_slot(saved, tmp_path):
    slots(saved[0]).pop(1)
    read(tmp_path / "state.pt", saved)


def slots(state):
    return state["optimizers"][0]["state"]


DAMAGES = {
    "step": lambda s: s.update(step="1"),
    "large": lambda s: s.update(step=10**400),
    "many tokens": lambda s: s.update(tokens=10**400),
    "negative": lambda s: s.update(step=-1),
    "seconds": lambda s: s.update(seconds=math.nan),
    "tokens": lambda s: s.pop("tokens"),
    "settings": lambda s: s.update(settings=b"{}"),
    "no losses": lambda s: s.update(val_losses=[]),
    "losses": lambda s: s.update(val_losses=[1, 2]),
    "order of losses": lambda s: s.update(val_losses=[(1, 1.0), (0, 1.0)]),
    "future losses": lambda s: s.update(val_losses=[(9, 1.0)]),
    "infinite loss": lambda s: s.update(val_losses=[(0, math.inf)]),
    "adapter": lambda s: s.update(adapter=[1]),
    "names": lambda s: s.update(adapter={"a": s["adapter"]["a"]}),
    "shape": lambda s: s.update(adapter={**s["adapter"], "a": torch.ones(3, 2)}),
    "dtype": lambda s: s.update(adapter={**s["adapter"], "a": torch.ones(2, 3, dtype=torch.int64)}),
    "sparse": lambda s: s.update(adapter={**s["adapter"], "a": torch.ones(2, 3).to_sparse()}),
    "number": lambda s: s.update(adapter={**s["adapter"], "a": 1.0}),
    "nan": lambda s: s.update(adapter={**s["adapter"], "a": torch.full((2, 3), math.nan)}),
    "best": lambda s: s.update(best={"a": 1}),
    "optimizers": lambda s: s.update(optimizers=[]),
    "optimizer": lambda s: s.update(optimizers=[3]),
    "no slots": lambda s: s["optimizers"][0].update(state={}),
    "other slots": lambda s: slots(s).update({2: slots(s).pop(1)}),
    "one slot": lambda s: slots(s)[0].pop("exp_avg"),
    "slot": lambda s: slots(s)[1].update(exp_avg=torch.full((4,), math.inf)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_a_one_line_error(saved, tmp_path, damage):
    DAMAGES[damage](saved[0])
    with pytest.raises(UserError) as error:
        read(tmp_path / "state.pt", saved)
    assert str(error.value).startswith(f"{tmp_path / 'state.pt'} is damaged (")
    assert str(error.value).endswith("); start again with --overwrite.") and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [3, [1], {}, torch.ones(2)], ids=str)
def test_other_pickles_are_refused(tmp_path, value):
    torch.save(value, tmp_path / "state.pt")
    with pytest.raises(UserError, match="is damaged"):
        read_saved_state(tmp_path / "state.pt")


def test_a_state_without_read_permission_is_not_reported_as_damaged(tmp_path, monkeypatch):
    def denied(path, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(torch, "load", denied)
    with pytest.raises(UserError, match=r"You have no permission to read .*state\.pt"):
        read_saved_state(tmp_path / "state.pt")


def test_the_latest_of_equal_losses_is_the_best():
    assert best_of([(0, 2.0), (5, 1.0), (9, 1.0), (12, 3.0)]) == (9, 1.0)
