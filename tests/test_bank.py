"""Batches with many Aligners, compared with each adapter loaded alone by `load_model`."""

import json
import re
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from toys import aligned, base, prompts, token_ids

from lit_llama import generation
from lit_llama.bank import META_KEY, Bank, open_bank
from lit_llama.checkpoint import AdapterFile, base_fingerprint, load_model, save_adapter, save_base
from lit_llama.compose import load_with_bank, parse_sum
from lit_llama.generation import Sampling, answer, generate, instruct
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.prompts import get_prompt_style
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError

PREFIX = "global_value_embedding.weight"
SHAPES = {"mha": {}, "gqa": dict(n_kv_head=2, qkv_bias=True)}
each_shape = pytest.mark.parametrize("shape", SHAPES)
WARM = Sampling(max_new_tokens=9, temperature=1.0, seed=3)


def make_adapter(length: int, start: int, seed: int, style: str = "alpaca", **shape) -> AdapterFile:
    """Return a random Aligner whose gates and prefix values are of order 1."""
    network = aligned(length, start, seed, **shape)
    state = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    config = {"adapter_prompt_length": length, "adapter_start_layer": start}
    return AdapterFile(state, {"method": "aligner", "config": config, "prompt_style": style}, Path(f"adapter-{seed}"))


ONES = {"a": (1, 1), "b": (1, 1), "late": (1, 2)}
MIXED = {**ONES, "three": (3, 1), "late three": (3, 2), "seven": (7, 1)}


def make_adapters(shape: str) -> dict[str, AdapterFile]:
    return {name: make_adapter(*MIXED[name], seed, **SHAPES[shape]) for seed, name in enumerate(MIXED, 10)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    paths = {}
    for shape, sizes in SHAPES.items():
        paths[shape], network = tmp_path_factory.mktemp(shape), base(**sizes)
        save_base(paths[shape], network.config, network.state_dict())
    return paths


def make_bank(folder: Path, adapters: dict[str, AdapterFile], **kwargs) -> Bank:
    bank = Bank(LLaMAConfig.from_json(folder / "lit_config.json"), folder, start_layer=1, **kwargs)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    return bank


def load_alone(folder: Path, adapters: dict[str, AdapterFile], name: str | None, dtype=torch.float32) -> LLaMA:
    return load_model(folder, adapters[name] if name else None, dtype=dtype)


BATCHES = [
    ["a"],
    ["a", "a", "a"],
    ["a", "b", "late", "b"],
    ["a", None, "b"],
    [None, None],
    ["three", "late three", "three"],
    ["seven", "seven"],
    ["three", None, "a", "seven", "b", "late three", "a", None, "seven"],
]


# == The same as one adapter at a time ==


@each_shape
@pytest.mark.parametrize("names", BATCHES, ids=lambda names: ",".join(map(str, names)))
def test_each_row_matches_its_adapter_alone(folders, shape, names):
    folder, adapters = folders[shape], make_adapters(shape)
    idx = token_ids(len(names), 12)
    model = load_with_bank(folder, make_bank(folder, adapters))
    with model.using(names):
        batched = model(idx)
    unadapted = load_model(folder)(idx)
    for row, name in enumerate(names):
        expected = load_alone(folder, adapters, name)(idx[row : row + 1])[0]
        torch.testing.assert_close(batched[row], expected, atol=3e-5, rtol=1e-5)
        assert torch.equal(batched[row], unadapted[row]) == (name is None)
        assert name is None or (batched[row] - unadapted[row]).abs().max() > 0.1
    assert torch.equal(model(idx), unadapted)  # outside the context, the base model


@each_shape
@pytest.mark.parametrize("sampling", [Sampling(9), WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("group_tokens", [generation.GROUP_TOKENS, 1])
def test_cached_decoding_of_a_mixed_batch_matches_each_adapter_alone(
    folders, shape, sampling, group_tokens, monkeypatch
):
    monkeypatch.setattr(generation, "GROUP_TOKENS", group_tokens)  # 1: one prefill per length
    folder, adapters = folders[shape], make_adapters(shape)
    model = load_with_bank(folder, make_bank(folder, adapters))
    names, prompt_ids = BATCHES[-1], prompts(5, 20, 1, 9, 3, 14, 7, 7, 2)
    with model.using(names):
        batched = generate(model, prompt_ids, sampling)
    for row, name in enumerate(names):
        assert batched[row] == generate(load_alone(folder, adapters, name), [prompt_ids[row]], sampling, rows=[row])[0]
    assert len({tuple(ids) for ids in batched}) == len(names)


def test_answers_are_in_order_at_any_batch_size(base_dir, tokenizer):
    shape = dict(vocab_size=300, padded_vocab_size=None, n_kv_head=2, intermediate_size=48)
    adapters = {name: make_adapter(*MIXED[name], seed, **shape) for seed, name in enumerate(MIXED, 10)}
    model = load_with_bank(base_dir, make_bank(base_dir, adapters))
    names = ["a", None, "three", "b", "a"]
    texts = ["the cat sat on the mat and", "the dog", "cat", "the hat the hat", "a mat on the dog and the rat"]
    single = [
        answer(load_alone(base_dir, adapters, name), tokenizer, [text], WARM, rows=[row])[0]
        for row, (name, text) in enumerate(zip(names, texts, strict=True))
    ]
    assert len(set(single)) == 5
    for size in (1, 2, 16):
        assert answer(model, tokenizer, texts, WARM, batch_size=size, adapters=names) == single
    plain = get_prompt_style("plain")
    assert instruct(model, tokenizer, texts, plain, WARM, adapters=names) == single


@each_shape
@pytest.mark.parametrize("names", [["a", "b", None], BATCHES[-1]], ids=["ones", "mixed"])
def test_with_a_bf16_base_a_batch_is_about_as_accurate_as_single_adapters(folders, shape, names):
    """The squared error of the batch against fp32 is less than 1.5 times that of one adapter at a time."""
    folder, adapters = folders[shape], make_adapters(shape)
    idx = token_ids(len(names), 12)
    model = load_with_bank(folder, make_bank(folder, adapters), dtype=torch.bfloat16)
    with model.using(names):
        batched = model(idx)
    assert batched.dtype == torch.bfloat16
    for row, name in enumerate(names):
        single = load_alone(folder, adapters, name, torch.bfloat16)(idx[row : row + 1])[0].float()
        exact = load_alone(folder, adapters, name)(idx[row : row + 1])[0]
        assert (batched[row].float() - exact).square().mean() < 1.5 * (single - exact).square().mean() + 1e-6


# == Projected prefixes ==


def watch_projections(model: LLaMA, monkeypatch) -> list[int]:
    """Return a list; each projection in the last layer appends its number of prefixes."""
    attn, counts = model.transformer.h[-1].attn, []
    keys_values = attn.keys_values

    def counted(x):
        counts.append(len(x))
        return keys_values(x)

    monkeypatch.setattr(attn, "keys_values", counted)
    return counts


@each_shape
def test_a_prefix_is_projected_once_at_any_strength_and_again_after_a_swap(folders, shape, monkeypatch):
    folder, adapters = folders[shape], make_adapters(shape)
    bank, idx = make_bank(folder, adapters), token_ids(2, 12)
    model = load_with_bank(folder, bank)
    counts = watch_projections(model, monkeypatch)
    rows = [[("three", 1.0), ("a", 0.5)], [("three", 0.5), ("late three", 1.0)]]
    for _ in range(2):
        with model.using(rows):
            batched = model(idx)
    assert counts == [1, 2]  # N = 1, then N = 3
    with model.using(["seven", "three"]):
        model(idx)
    assert counts == [1, 2, 1]
    with model.using(rows):
        assert torch.equal(model(idx), batched)

    bank.swap("three", adapters["late three"])
    with model.using(["three", "late three"]):
        swapped = model(idx)
    assert counts == [1, 2, 1, 1]
    expected = load_alone(folder, adapters, "late three")(idx)
    torch.testing.assert_close(swapped, expected, atol=3e-5, rtol=1e-5)


def test_projected_prefixes_are_cached_up_to_a_limit(folders, monkeypatch):
    folder, adapters = folders["gqa"], make_adapters("gqa")
    model = load_with_bank(folder, make_bank(folder, adapters))
    with model.using(["three", "a"]):
        pass
    config = model.config
    token_bytes = (config.n_layer - 1) * config.n_kv_head * config.head_size * 4  # bytes of the values of one token
    assert (
        model.projected.nbytes == sum(entry.nbytes for entry in model.projected.values()) == (1 + 2 * 3) * token_bytes
    )
    monkeypatch.setattr("lit_llama.compose.PROJECTED_BYTES", 2 * 3 * token_bytes + token_bytes)
    with model.using(["three"]), model.using(["b"]):
        assert list(model.projected) == ["three", "b"]  # the least recently used one was evicted
    idx = token_ids(3, 12)
    with model.using(["seven", "three", "late three"]):  # more than the cache can hold
        batched = model(idx)
    assert model.projected.nbytes <= 2 * 3 * token_bytes + token_bytes
    for row, name in enumerate(["seven", "three", "late three"]):
        expected = load_alone(folder, adapters, name)(idx[row : row + 1])[0]
        torch.testing.assert_close(batched[row], expected, atol=3e-5, rtol=1e-5)


def test_a_bf16_bank_rounds_its_adapters(folders):
    folder, adapters = folders["gqa"], make_adapters("gqa")
    bank = make_bank(folder, adapters, dtype=torch.bfloat16)
    rounded = {
        name: AdapterFile({key: t.bfloat16().float() for key, t in adapter.state.items()}, adapter.meta, adapter.path)
        for name, adapter in adapters.items()
    }
    model, idx = load_with_bank(folder, bank), token_ids(3, 10)
    with model.using(["seven", "a", "three"]):
        batched = model(idx)
    for row, name in enumerate(["seven", "a", "three"]):
        expected = load_alone(folder, rounded, name)(idx[row : row + 1])[0]
        torch.testing.assert_close(batched[row], expected, atol=3e-5, rtol=1e-5)
    assert bank.nbytes == 2 * sum((n * 32 + 2 * 4) for n, _ in MIXED.values())


# == The bank ==


@each_shape
def test_adapters_round_trip_exactly(folders, shape):
    folder, adapters = folders[shape], make_adapters(shape)
    bank, idx = make_bank(folder, adapters), token_ids(2, 8)
    for name, adapter in adapters.items():
        restored = bank.adapter(name)
        assert all(torch.equal(restored.state[key], t) for key, t in adapter.state.items())
        assert torch.equal(load_model(folder, restored)(idx), load_model(folder, adapter)(idx))
    assert list(bank) == list(adapters) and len(bank) == 6 and "a" in bank and "c" not in bank


def test_a_one_token_adapter_at_7b_has_5056_parameters():
    config = LLaMAConfig.from_name("7B")
    state = {PREFIX: torch.randn(1, 4096)}
    state |= {f"transformer.h.{layer}.attn.gating_factor": torch.randn(1, 32, 1, 1) for layer in range(2, 32)}
    bank = Bank(config, dtype=torch.bfloat16)
    bank.add("one", AdapterFile(state, path=Path("one.pth")))  # the authors' files have no header
    assert bank.nbytes == 2 * 5056


def test_swapping_and_removing_leave_other_adapters_unchanged(folders):
    """The other adapters are unchanged bit for bit, in the bank and in batches without swapped adapters.

    With swapped adapters, a matrix product has a different number of prefixes and may round differently.
    """
    folder, adapters = folders["mha"], make_adapters("mha")
    bank, idx = make_bank(folder, adapters), token_ids(6, 8)
    model, current = load_with_bank(folder, bank), dict(adapters)

    def run(used: list[str]) -> torch.Tensor:
        with model.using(used):
            return model(idx[: len(used)])

    def check() -> None:
        assert list(bank) == list(current)
        for name, adapter in current.items():
            restored = bank.adapter(name).state
            assert all(torch.equal(restored[key], t) for key, t in adapter.state.items())
        batched = run(list(current))
        for row, name in enumerate(current):
            expected = load_alone(folder, current, name)(idx[row : row + 1])[0]
            torch.testing.assert_close(batched[row], expected, atol=3e-5, rtol=1e-5)

    check()
    others = ["a", "three", "late three", "seven"]
    before = run(others)
    b_slot = bank["b"]
    bank.swap("b", adapters["three"])  # another length
    bank.swap("late", adapters["a"])  # the same length
    current |= {"b": adapters["three"], "late": adapters["a"]}
    check()
    assert torch.equal(run(others), before)

    a_slot = bank["a"]
    bank.remove("a")
    del current["a"]
    check()
    others.remove("a")
    before = run(others)
    with pytest.raises(UserError, match="no adapter named 'a'"):
        run(["a"])
    bank.add("new", adapters["late"])
    bank.add("newer", adapters["b"])
    current |= {"new": adapters["late"], "newer": adapters["b"]}
    for name, slot in (("new", a_slot), ("newer", b_slot)):  # rows of removed adapters are reused
        assert bank[name].block is slot.block and bank[name].row == slot.row
    assert torch.equal(run(others), before)
    bank.remove("seven")
    del current["seven"]
    check()


def test_adapters_in_many_blocks_do_not_overlap(monkeypatch):
    monkeypatch.setattr("lit_llama.bank.BLOCK_BYTES", 1000)
    bank = Bank(base().config, start_layer=1)
    adapters = {f"user {i}": make_adapter(1 + i % 3, 1, i) for i in range(60)}
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    assert len({id(slot.block) for slot in bank.values()}) > 20
    for name in list(adapters)[::7]:
        bank.remove(name)
        del adapters[name]
    for name, adapter in adapters.items():
        assert torch.equal(bank.adapter(name).state[PREFIX], adapter.state[PREFIX])


def test_random_changes_keep_each_adapter_in_a_separate_row(monkeypatch):
    monkeypatch.setattr("lit_llama.bank.BLOCK_BYTES", 1000)
    adapters, random = [make_adapter(1 + i % 3, 1, i) for i in range(6)], Random(0)
    bank, current = Bank(base().config, start_layer=1), {}
    for _ in range(300):
        name, adapter = f"user {random.randrange(30)}", random.choice(adapters)
        if name not in current:
            bank.add(name, adapter)
        elif random.random() < 0.5:
            bank.swap(name, adapter)
        else:
            bank.remove(name)
            del current[name]
            continue
        current[name] = adapter
        assert len({(id(slot.block), slot.row) for slot in bank.values()}) == len(current)
    assert list(bank) == list(current) and len({id(slot.block) for slot in bank.values()}) < 20  # rows are reused
    for name, adapter in current.items():
        assert all(torch.equal(bank.adapter(name).state[key], t) for key, t in adapter.state.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bank_round_trips_and_later_changes_leave_its_file_alone(folders, tmp_path, dtype):
    folder, adapters = folders["gqa"], make_adapters("gqa")
    bank, path = make_bank(folder, adapters, dtype=dtype), tmp_path / "many.safetensors"
    bank.remove("a")
    bank.add("näme", make_adapter(1, 1, 77, "beaver", **SHAPES["gqa"]))
    bank.remove("b")
    bank.save(path)
    content = path.read_bytes()
    loaded = Bank.load(path, folder)
    assert set(loaded) == set(bank) and loaded.dtype == dtype and loaded.start_layer == 1
    assert loaded["näme"].style == "beaver" and loaded["late"].style == "alpaca"
    for name in bank:
        ours, theirs = bank.adapter(name), loaded.adapter(name)
        assert all(torch.equal(theirs.state[key], t) for key, t in ours.state.items())
        assert ours.meta == theirs.meta
    loaded.swap("seven", make_adapter(7, 1, 5, **SHAPES["gqa"]))
    loaded.swap("late", adapters["b"])
    loaded.remove("three")
    loaded.add("another", adapters["three"])
    assert path.read_bytes() == content
    loaded.save(path)
    reloaded = Bank.load(path, folder)
    assert set(reloaded) == {"late", "late three", "seven", "näme", "another"}
    assert torch.equal(reloaded.adapter("late").state[PREFIX],
                       adapters["b"].state[PREFIX].to(dtype).float())  # fmt: skip


# == Errors ==


def test_unknown_names_are_refused_with_similar_ones(folders):
    bank = make_bank(folders["mha"], {name: make_adapters("mha")["a"] for name in ("pirate", "polite", "json")})
    with pytest.raises(UserError, match=r"^There is no adapter named 'pirat' among the 3 of the bank; similar names "
                       r"are 'pirate'\.$"):  # fmt: skip
        bank.remove("pirat")
    with pytest.raises(UserError, match=r"no adapter named 'xyz' among the 3 of the bank; some names are '.*'\.$"):
        bank.swap("xyz", make_adapters("mha")["a"])
    model = load_with_bank(folders["mha"], bank)
    with pytest.raises(UserError, match="similar names are 'json'"), model.using(["json", "jsom"]):
        raise AssertionError
    model(token_ids(5, 3))  # the failed attempt has no effect
    with pytest.raises(UserError, match=r"no adapter named 'x' among the 0 of the bank\.$"):
        Bank(model.config).adapter("x")
    for call in (bank.swap, lambda name, _: bank.adapter(name), lambda name, _: bank.gather(["json", name])):
        with pytest.raises(UserError, match="no adapter named 'jso'"):
            call("jso", make_adapters("mha")["a"])


def test_an_unknown_name_is_compared_with_only_some_names_of_a_large_bank(monkeypatch):
    class Counted(Bank):
        def __iter__(self):
            for name in super().__iter__():
                seen.append(name)
                yield name

    monkeypatch.setattr("lit_llama.bank.COMPARED", 20)
    bank, seen = Counted(base().config, start_layer=1), []
    for i in range(50):
        bank.add(f"user-{i}", make_adapter(1, 1, 0))
    for name, hint in (("user", "similar names are 'user-"), ("xyz", "some names are 'user-0', 'user-1', 'user-2'")):
        seen.clear()
        with pytest.raises(UserError, match=f"among the 50 of the bank; {hint}"):
            bank.check(name)
        assert len(seen) <= 20


def test_taken_and_reserved_names_are_refused(folders):
    bank = make_bank(folders["mha"], {"pirate": make_adapters("mha")["a"]})
    for name in ("pirate", "base", ""):
        with pytest.raises(UserError, match=f"The name '{name}' is taken"):
            bank.add(name, make_adapters("mha")["b"])


def test_incompatible_adapters_are_refused_and_change_nothing(folders):
    folder, good = folders["mha"], make_adapters("mha")["a"]
    bank = make_bank(folder, {"a": good})
    fingerprint = base_fingerprint(folder)
    wide = {**good.state, PREFIX: torch.randn(1, 64)}
    short = {name: t for name, t in good.state.items() if ".2." not in name}
    incompatible = {
        "is 64 wide and the base model in": AdapterFile(wide, good.meta, good.path),
        "with other weights": AdapterFile(
            good.state, {**good.meta, "base": {**fingerprint, "weights": "0" * 16}}, good.path
        ),
        r"was trained on a base with \{'n_kv_head': 2, 'qkv_bias': True\}": AdapterFile(
            good.state, {**good.meta, "base": base_fingerprint(folders["gqa"])}, good.path
        ),
        "made by the method 'lora'; a bank holds Aligners": AdapterFile(
            {}, {"method": "lora", "config": {}}, good.path
        ),
        "starts at layer 0, below the bank's start layer 1": make_adapter(1, 0, 1),
        "starts at layer 3; the base's last layer is 2": AdapterFile(
            {PREFIX: good.state[PREFIX]}, {**good.meta, "config": {**good.config, "adapter_start_layer": 3}}, good.path
        ),
        r"does not fit the bank's base: transformer\.h\.2\.attn\.gating_factor is missing": AdapterFile(
            short, good.meta, good.path
        ),
    }
    for message, adapter in incompatible.items():
        with pytest.raises(UserError, match=message):
            bank.add("b", adapter)
        with pytest.raises(UserError, match=message):
            bank.swap("a", adapter)
    assert list(bank) == ["a"] and torch.equal(bank.adapter("a").state[PREFIX], good.state[PREFIX])
    without_base = Bank(bank.config, start_layer=1)
    with pytest.raises(UserError, match=r"global_value_embedding.weight is \(1, 64\), not \(1, 32\)"):
        without_base.add("wide", AdapterFile(wide, good.meta, good.path))
    with pytest.raises(UserError, match="start_layer is 3; it must be from 0 to 2"):
        Bank(bank.config, start_layer=3)


def test_a_bank_of_files_accepts_later_adapters_that_start_lower(tmp_path):
    network = base(n_layer=5)
    save_base(tmp_path, network.config, network.state_dict())
    late, usual, early = (make_adapter(1, start, start, n_layer=5) for start in (4, 2, 1))
    for name, adapter in (("late", late), ("early", early)):
        save_adapter(
            tmp_path / f"{name}.safetensors", adapter.state, {**adapter.meta, "base": base_fingerprint(tmp_path)}
        )
    bank = open_bank([tmp_path / "late.safetensors"], tmp_path)
    bank.add("usual", usual)
    assert torch.equal(bank.adapter("usual").state[PREFIX], usual.state[PREFIX])
    with pytest.raises(UserError, match=r"starts at layer 1, below the bank's start layer 2; name it in --bank"):
        bank.add("early", early)
    open_bank([tmp_path / f"{name}.safetensors" for name in ("late", "early")], tmp_path).add("usual", usual)
    open_bank([], tmp_path).add("usual", usual)


def test_a_bank_of_another_base_is_refused(folders, tmp_path):
    path = tmp_path / "bank.safetensors"
    make_bank(folders["mha"], {"a": make_adapters("mha")["a"]}).save(path)
    with pytest.raises(UserError, match="was trained on a base with"):
        Bank.load(path, folders["gqa"])
    other = base(seed=5)
    save_base(tmp_path / "other", other.config, other.state_dict())
    with pytest.raises(UserError, match="with other weights"):
        Bank.load(path, tmp_path / "other")
    with pytest.raises(UserError, match="The bank is for a base of another shape"):
        load_with_bank(folders["gqa"], Bank.load(path))
    loaded = Bank.load(path)  # the file knows its base
    load_with_bank(folders["mha"], loaded)
    with pytest.raises(UserError, match="The adapter a was trained on a base of this shape but with other weights"):
        load_with_bank(tmp_path / "other", loaded)
    meta = {"method": "aligner", "base": base_fingerprint(tmp_path / "other")}
    with pytest.raises(UserError, match="other weights than the bank "):
        loaded.add("b", AdapterFile(make_adapters("mha")["b"].state, meta, Path("b")))
    loaded.save(tmp_path / "again.safetensors")
    with pytest.raises(UserError, match="with other weights"):
        Bank.load(tmp_path / "again.safetensors", tmp_path / "other")
    save_adapter(tmp_path / "a.safetensors", make_adapters("mha")["a"].state, {})
    for name, message in (("a.safetensors", "is not a bank"), ("none", "There is no file at")):
        with pytest.raises(UserError, match=message):
            Bank.load(tmp_path / name)
    without_base = Bank(base().config)
    without_base.save(path)
    with pytest.raises(UserError, match="was trained on a base with"):
        Bank.load(path, folders["gqa"])


def test_damaged_banks_are_refused(folders, tmp_path):
    bank = make_bank(folders["mha"], {"a": make_adapters("mha")["a"], "b": make_adapters("mha")["b"]})
    path = tmp_path / "x.safetensors"
    bank.save(path)
    with safe_open(path, framework="pt") as file:
        header, tensors = json.loads(file.metadata()[META_KEY]), {key: file.get_tensor(key) for key in file.keys()}

    def without(name: str) -> dict[str, object]:
        return {key: value for key, value in header.items() if key != name}

    def refused(words: str, header: object, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, path, metadata={META_KEY: json.dumps(header)})
        with pytest.raises(UserError, match=rf"{re.escape(words)}.*\.$"):
            Bank.load(path, folders["mha"])

    for words, changed in (
        ("holds a list; expected an object", []),
        ("KeyError: 'config'", {}),
        ("KeyError: 'config'", without("config")),
        ("its header has no start_layer", without("start_layer")),
        ("its header has no base", without("base")),
        ("KeyError: 'lengths'", without("lengths")),
        ('n_layer is "3"; expected a whole number', {**header, "config": {"n_layer": "3"}}),
        ("unexpected keyword argument 'depth'", {**header, "config": {"depth": 3}}),
        ("a tensor is (2, 40), torch.float32; it must be (2, 72)", {**header, "lengths": [2]}),
        ("does not contain tensor adapters.1", {**header, "lengths": [1, 1]}),
        ("object is not iterable", {**header, "lengths": 1}),
        ("can only concatenate str", {**header, "lengths": ["1"]}),
        ("its header: base has no config", {**header, "base": {"weights": "0"}}),
        ("its header: base has no weights", {**header, "base": {"config": {}}}),
        ('start_layer is "x"; expected a whole number', {**header, "start_layer": "x"}),
        ("start_layer is 1.0; expected a whole number", {**header, "start_layer": 1.0}),
        ("start_layer is true; expected a whole number", {**header, "start_layer": True}),
        ("start_layer is 5; it must be from 0 to 2", {**header, "start_layer": 5}),
    ):
        refused(words, changed, tensors)
    for words, names in (
        ("it must be (0, 40)", []),
        ("it must be (0, 40)", {}),
        ("it must be (1, 40)", [["a", "alpaca"]]),
        ("a name occurs twice", [["a", "alpaca"]] * 2),
        ("argument must be str", [["a", 3], ["b", "alpaca"]]),
        ("not enough values to unpack", [["a"], ["b"]]),
        ("has no len()", 7),
        ("unhashable type", [[[], "alpaca"], ["b", "alpaca"]]),
        ("is not text", [[3, "alpaca"], ["b", "alpaca"]]),
    ):
        content = torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8)
        refused(words, header, tensors | {"names.0": content})
    for part in (torch.zeros(2, 5), torch.zeros(2, 40, dtype=torch.int32), torch.zeros(())):
        words = f"a tensor is {tuple(part.shape)}, {part.dtype}; it must be (2, 40)"
        refused(words, header, tensors | {"adapters.0": part})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="is not a bank"):
        Bank.load(path)
    tensors["adapters.0"][1, -1] = torch.inf
    save_file(tensors, path, metadata={META_KEY: json.dumps(header)})
    loaded = Bank.load(path, folders["mha"])
    assert parse_sum("a", loaded) == (("a", 1.0),)
    with pytest.raises(UserError, match="The adapter 'b' of the bank holds numbers that are not finite"):
        parse_sum("a+b", loaded)


def test_a_batch_of_the_wrong_size_is_refused(folders):
    model = load_with_bank(folders["mha"], make_bank(folders["mha"], make_adapters("mha")))
    with model.using(["a", "b"]), pytest.raises(UserError, match="adapters for 2 rows, and the batch has 3"):
        model(token_ids(3, 4))
    assert model(token_ids(3, 4)).shape == (3, 4, 50)


# == The command line ==


@pytest.fixture
def trained(base_dir, tmp_path) -> dict[str, Path]:
    """Folders of two adapters of the same base model."""
    shape = dict(vocab_size=300, padded_vocab_size=None, n_kv_head=2, intermediate_size=48)
    paths = {}
    for seed, (name, style, length) in enumerate([("cat", "plain", 1), ("dog", "orca", 4)]):
        adapter = make_adapter(length, 1, seed, style, **shape)
        paths[name] = tmp_path / name
        save_adapter(
            paths[name] / "best.safetensors", adapter.state, {**adapter.meta, "base": base_fingerprint(base_dir)}
        )
    return paths


def test_a_prompt_file_can_name_an_adapter_for_each_row(run_script, base_dir, trained, tmp_path):
    rows = [("the cat", "dog"), ("the dog and the hat", "cat"), ("a mat", None), ("a rat", "cat"), ("the mat", "base")]
    file, output = tmp_path / "rows.jsonl", tmp_path / "out.json"
    file.write_text("\n".join(json.dumps({"prompt": p} | ({"adapter": a} if a else {})) for p, a in rows))
    flags = ["--checkpoint_dir", base_dir, "--max_new_tokens", "8", "--temperature", "1"]
    bank = ["--bank", *trained.values(), "--use", "dog"]
    code, out, err = run_script("generate/aligner.py", *flags, *bank, "--prompt_file", file, "--output_file", output)
    assert code == 0, err
    records = json.loads(output.read_text())
    names = ["dog", "cat", "dog", "cat", "base"]
    assert [record["adapter"] for record in records] == names
    assert "> (cat) the dog and the hat" in out
    tokenizer = Tokenizer(base_dir)
    for row, ((text, _), name) in enumerate(zip(rows, names, strict=True)):
        style = get_prompt_style({"cat": "plain", "dog": "orca", "base": "plain"}[name])
        model = load_model(base_dir, None if name == "base" else open_bank([trained[name]], base_dir).adapter(name))
        sampling = Sampling(8, 1.0, seed=1234)
        (expected,) = answer(model, tokenizer, [style.render(text)], sampling, style.stop, 1, style.continues, [row])
        assert records[row]["response"] == expected


def test_the_command_line_accepts_a_bank_file(run_script, base_dir, trained, tmp_path):
    open_bank(list(trained.values()), base_dir).save(tmp_path / "both.safetensors")
    flags = ["--checkpoint_dir", base_dir, "--max_new_tokens", "5", "--prompt", "the cat", "the dog"]
    flags += ["--use", "cat", "dog"]
    _, from_folders, _ = run_script("generate/aligner.py", *flags, "--bank", *trained.values())
    _, from_file, _ = run_script("generate/aligner.py", *flags, "--bank", tmp_path / "both.safetensors")
    assert from_file == from_folders and from_file.count("> (") == 2
    _, compared, _ = run_script("generate/aligner.py", *flags, "--bank", *trained.values(), "--compare_base")
    assert compared.count("aligned: ") == compared.count("base:") == 2


def test_a_bank_supports_sums_strengths_and_chat_on_the_command_line(run_script, base_dir, trained):
    flags = ["--checkpoint_dir", base_dir, "--max_new_tokens", "8", "--prompt_style", "plain"]
    bank, prompt = ["--bank", *trained.values()], ["--prompt", "the cat"]

    def answers(*more: object, stdin: str = "") -> str:
        code, out, err = run_script("generate/aligner.py", *flags, *more, stdin=stdin)
        assert code == 0, err
        assert ("so the base model answers" in err) == ("--bank" in more and "--use" not in more)
        return out

    both = answers("--adapter", *trained.values(), "--strength", "1", "0.5", *prompt)
    assert answers(*bank, "--use", "cat+dog:0.5", *prompt) == both
    assert answers(*bank, "--use", "cat:2+dog", "--strength", "0.5", *prompt) == both
    assert answers(*bank, "--use", "cat+dog:0.5", "--interactive", stdin="the cat\n") == both
    base = answers(*bank, *prompt)
    assert answers(*bank, "--use", "cat+dog", "--strength", "0", *prompt) == base != both
    assert answers(*bank, "--interactive", stdin="the cat\n") == base
    compared = answers(*bank, "--use", "cat+dog:0.5", "--compare_base", *prompt)
    assert compared == f"> (cat+dog:0.5) the cat\nbase:    {base}aligned: {both}"


def test_command_line_errors_are_one_line(refused, base_dir, trained, tmp_path):
    flags = ["--checkpoint_dir", base_dir, "--bank", *trained.values(), "--prompt", "the cat", "the dog", "a rat"]
    assert "no adapter named 'cot' among the 2 of the bank; similar names are 'cat'" in refused(
        "generate/aligner.py", *flags, "--use", "cot"
    )
    assert "3 prompts and 2 names in --use" in refused("generate/aligner.py", *flags, "--use", "cat", "dog")
    assert "--strength takes one number for all" in refused("generate/aligner.py", *flags, "--strength", "0.5", "1")
    assert "no adapter named 'dog:x' among the 2" in refused("generate/aligner.py", *flags, "--use", "cat+dog:x")
    assert "give --bank too" in refused("generate/aligner.py", "--use", "cat")
    duplicate = tmp_path / "twin" / "cat"
    shutil.copytree(trained["cat"], duplicate)
    names = list(open_bank([trained["cat"], duplicate, trained["dog"]], base_dir))
    assert names == [str(trained["cat"]), str(duplicate), "dog"]
    twice = [trained["cat"]] * 2
    assert f"The name '{trained['cat']}' is taken" in refused("generate/aligner.py", *flags, "--bank", *twice)
    with pytest.raises(UserError, match="There is no adapter at"):
        open_bank([tmp_path / "none"], base_dir)
    Bank(LLaMAConfig.from_json(base_dir / "lit_config.json"), base_dir).save(tmp_path / "empty.safetensors")
    assert "has no adapters" in refused("generate/aligner.py", *flags[:2], "--bank", tmp_path / "empty.safetensors")
    open_bank([trained["cat"]], base_dir).save(tmp_path / "one.safetensors")
    for several in (("--adapter",), ("--bank", trained["dog"])):
        error = refused("generate/aligner.py", *flags[:2], *several, tmp_path / "one.safetensors")
        assert "one.safetensors is a bank, not an adapter; give it alone to generate/aligner.py, with --bank." in error


def test_adapter_names_in_prompts_are_ignored_without_a_bank(run_script, base_dir, trained, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "the cat", "adapter": "dog"}\n')
    flags = ["--checkpoint_dir", base_dir, "--adapter", trained["cat"], "--max_new_tokens", "4"]
    code, out, err = run_script("generate/aligner.py", *flags, "--prompt_file", file)
    assert code == 0 and "are ignored; they need generate/aligner.py --bank" in err
    assert out == run_script("generate/aligner.py", *flags, "--prompt", "the cat")[1]
