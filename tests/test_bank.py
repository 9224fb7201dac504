"""Many Aligners in one batch. The reference is each adapter alone, through `load_model`."""

import json
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


def adapter(length: int, start: int, seed: int, style: str = "alpaca", **shape) -> AdapterFile:
    """With open gates, of about 1, and a prefix of about 1."""
    network = aligned(length, start, seed, **shape)
    state = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    config = {"adapter_prompt_length": length, "adapter_start_layer": start}
    return AdapterFile(state, {"method": "aligner", "config": config, "prompt_style": style}, Path(f"adapter-{seed}"))


ONES = {"a": (1, 1), "b": (1, 1), "late": (1, 2)}
MIXED = {**ONES, "three": (3, 1), "late three": (3, 2), "seven": (7, 1)}


def adapters_of(shape: str) -> dict[str, AdapterFile]:
    return {name: adapter(*MIXED[name], seed, **SHAPES[shape]) for seed, name in enumerate(MIXED, 10)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for shape, sizes in SHAPES.items():
        made[shape], network = tmp_path_factory.mktemp(shape), base(**sizes)
        save_base(made[shape], network.config, network.state_dict())
    return made


def filled(folder: Path, adapters: dict[str, AdapterFile], **kwargs) -> Bank:
    bank = Bank(LLaMAConfig.from_json(folder / "lit_config.json"), folder, start_layer=1, **kwargs)
    for name, one in adapters.items():
        bank.add(name, one)
    return bank


def alone(folder: Path, adapters: dict[str, AdapterFile], name: str | None, dtype=torch.float32) -> LLaMA:
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
def test_each_row_is_what_its_adapter_says_alone(folders, shape, names):
    folder, adapters = folders[shape], adapters_of(shape)
    idx = token_ids(len(names), 12)
    model = load_with_bank(folder, filled(folder, adapters))
    with model.using(names):
        together = model(idx)
    unadapted = load_model(folder)(idx)
    for row, name in enumerate(names):
        expected = alone(folder, adapters, name)(idx[row : row + 1])[0]
        torch.testing.assert_close(together[row], expected, atol=3e-5, rtol=1e-5)
        assert torch.equal(together[row], unadapted[row]) == (name is None)
        assert name is None or (together[row] - unadapted[row]).abs().max() > 0.1
    assert torch.equal(model(idx), unadapted)  # outside, the base


@each_shape
@pytest.mark.parametrize("sampling", [Sampling(9), WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("group_tokens", [generation.GROUP_TOKENS, 1])
def test_cached_decoding_in_batches_by_length_gives_each_prompt_its_own_answer(
    folders, shape, sampling, group_tokens, monkeypatch
):
    monkeypatch.setattr(generation, "GROUP_TOKENS", group_tokens)  # 1: a prefill for each length
    folder, adapters = folders[shape], adapters_of(shape)
    model = load_with_bank(folder, filled(folder, adapters))
    names, asked = BATCHES[-1], prompts(5, 20, 1, 9, 3, 14, 7, 7, 2)
    with model.using(names):
        together = generate(model, asked, sampling)
    for row, name in enumerate(names):
        assert together[row] == generate(alone(folder, adapters, name), [asked[row]], sampling, rows=[row])[0]
    assert len({tuple(ids) for ids in together}) == len(names)


def test_texts_are_answered_in_their_order_whatever_the_batch_size(base_dir, tokenizer):
    shape = dict(vocab_size=300, padded_vocab_size=None, n_kv_head=2, intermediate_size=48)
    adapters = {name: adapter(*MIXED[name], seed, **shape) for seed, name in enumerate(MIXED, 10)}
    model = load_with_bank(base_dir, filled(base_dir, adapters))
    names = ["a", None, "three", "b", "a"]
    asked = ["the cat sat on the mat and", "the dog", "cat", "the hat the hat", "a mat on the dog and the rat"]
    single = [
        answer(alone(base_dir, adapters, name), tokenizer, [text], WARM, rows=[row])[0]
        for row, (name, text) in enumerate(zip(names, asked, strict=True))
    ]
    assert len(set(single)) == 5
    for size in (1, 2, 16):
        assert answer(model, tokenizer, asked, WARM, batch_size=size, adapters=names) == single
    plain = get_prompt_style("plain")
    assert instruct(model, tokenizer, asked, plain, WARM, adapters=names) == single


@each_shape
@pytest.mark.parametrize("names", [["a", "b", None], BATCHES[-1]], ids=["ones", "mixed"])
def test_under_a_bf16_base_a_batch_is_as_near_as_rounding_allows(folders, shape, names):
    """Against fp32 the batch may be no worse than one adapter at a time."""
    folder, adapters = folders[shape], adapters_of(shape)
    idx = token_ids(len(names), 12)
    model = load_with_bank(folder, filled(folder, adapters), dtype=torch.bfloat16)
    with model.using(names):
        together = model(idx)
    assert together.dtype == torch.bfloat16
    for row, name in enumerate(names):
        single = alone(folder, adapters, name, torch.bfloat16)(idx[row : row + 1])[0].float()
        exact = alone(folder, adapters, name)(idx[row : row + 1])[0]
        assert (together[row].float() - exact).square().mean() < 1.5 * (single - exact).square().mean() + 1e-6


# == Projected prefixes ==


def watch_projections(model: LLaMA, monkeypatch) -> list[int]:
    """Return a list that grows by the number of prefixes whenever the last layer projects some."""
    attn, counts = model.transformer.h[-1].attn, []
    keys_values = attn.keys_values

    def counted(x):
        counts.append(len(x))
        return keys_values(x)

    monkeypatch.setattr(attn, "keys_values", counted)
    return counts


@each_shape
def test_a_prefix_is_projected_once_at_any_strength_and_again_after_a_swap(folders, shape, monkeypatch):
    folder, adapters = folders[shape], adapters_of(shape)
    bank, idx = filled(folder, adapters), token_ids(2, 12)
    model = load_with_bank(folder, bank)
    counts = watch_projections(model, monkeypatch)
    rows = [[("three", 1.0), ("a", 0.5)], [("three", 0.5), ("late three", 1.0)]]
    for _ in range(2):
        with model.using(rows):
            together = model(idx)
    assert counts == [1, 2]  # N = 1, then N = 3
    with model.using(["seven", "three"]):
        model(idx)
    assert counts == [1, 2, 1]
    with model.using(rows):
        assert torch.equal(model(idx), together)

    bank.swap("three", adapters["late three"])
    with model.using(["three", "late three"]):
        swapped = model(idx)
    assert counts == [1, 2, 1, 1]
    expected = alone(folder, adapters, "late three")(idx)
    torch.testing.assert_close(swapped, expected, atol=3e-5, rtol=1e-5)


def test_projected_prefixes_are_kept_up_to_a_size(folders, monkeypatch):
    folder, adapters = folders["gqa"], adapters_of("gqa")
    model = load_with_bank(folder, filled(folder, adapters))
    with model.using(["three", "a"]):
        pass
    config = model.config
    one = (config.n_layer - 1) * config.n_kv_head * config.head_size * 4  # bytes of the values of a token
    assert model.projected.nbytes == sum(kept.nbytes for kept in model.projected.values()) == (1 + 2 * 3) * one
    monkeypatch.setattr("lit_llama.compose.PROJECTED_BYTES", 2 * 3 * one + one)
    with model.using(["three"]), model.using(["b"]):
        assert list(model.projected) == ["three", "b"]  # the one that was used longest ago is gone
    idx = token_ids(3, 12)
    with model.using(["seven", "three", "late three"]):  # more than are kept
        together = model(idx)
    assert model.projected.nbytes <= 2 * 3 * one + one
    for row, name in enumerate(["seven", "three", "late three"]):
        expected = alone(folder, adapters, name)(idx[row : row + 1])[0]
        torch.testing.assert_close(together[row], expected, atol=3e-5, rtol=1e-5)


def test_a_bf16_bank_holds_the_rounded_adapter(folders):
    folder, adapters = folders["gqa"], adapters_of("gqa")
    bank = filled(folder, adapters, dtype=torch.bfloat16)
    rounded = {
        name: AdapterFile({key: t.bfloat16().float() for key, t in one.state.items()}, one.meta, one.path)
        for name, one in adapters.items()
    }
    model, idx = load_with_bank(folder, bank), token_ids(3, 10)
    with model.using(["seven", "a", "three"]):
        together = model(idx)
    for row, name in enumerate(["seven", "a", "three"]):
        expected = alone(folder, rounded, name)(idx[row : row + 1])[0]
        torch.testing.assert_close(together[row], expected, atol=3e-5, rtol=1e-5)
    assert bank.nbytes == 2 * sum((n * 32 + 2 * 4) for n, _ in MIXED.values())


# == The bank ==


@each_shape
def test_an_adapter_comes_back_as_it_was(folders, shape):
    folder, adapters = folders[shape], adapters_of(shape)
    bank, idx = filled(folder, adapters), token_ids(2, 8)
    for name, one in adapters.items():
        back = bank.adapter(name)
        assert all(torch.equal(back.state[key], t) for key, t in one.state.items())
        assert torch.equal(load_model(folder, back)(idx), load_model(folder, one)(idx))
    assert list(bank) == list(adapters) and len(bank) == 6 and "a" in bank and "c" not in bank


def test_at_7b_one_token_takes_5056_numbers():
    config = LLaMAConfig.from_name("7B")
    state = {PREFIX: torch.randn(1, 4096)}
    state |= {f"transformer.h.{layer}.attn.gating_factor": torch.randn(1, 32, 1, 1) for layer in range(2, 32)}
    bank = Bank(config, dtype=torch.bfloat16)
    bank.add("one", AdapterFile(state, path=Path("one.pth")))  # the authors' files have no header
    assert bank.nbytes == 2 * 5056


def test_swapping_and_removing_touch_no_other(folders):
    """Bit for bit in the bank and in batches of the others; beside the swapped ones a product holds another number of
    prefixes and may round otherwise."""
    folder, adapters = folders["mha"], adapters_of("mha")
    bank, idx = filled(folder, adapters), token_ids(6, 8)
    model, held = load_with_bank(folder, bank), dict(adapters)

    def rows(used: list[str]) -> torch.Tensor:
        with model.using(used):
            return model(idx[: len(used)])

    def check() -> None:
        assert list(bank) == list(held)
        for name, one in held.items():
            back = bank.adapter(name).state
            assert all(torch.equal(back[key], t) for key, t in one.state.items())
        together = rows(list(held))
        for row, name in enumerate(held):
            expected = alone(folder, held, name)(idx[row : row + 1])[0]
            torch.testing.assert_close(together[row], expected, atol=3e-5, rtol=1e-5)

    check()
    others = ["a", "three", "late three", "seven"]
    before = rows(others)
    b_place = bank["b"]
    bank.swap("b", adapters["three"])  # of another length
    bank.swap("late", adapters["a"])  # of the same
    held |= {"b": adapters["three"], "late": adapters["a"]}
    check()
    assert torch.equal(rows(others), before)

    a_place = bank["a"]
    bank.remove("a")
    del held["a"]
    check()
    others.remove("a")
    before = rows(others)
    with pytest.raises(UserError, match="no adapter named 'a'"):
        rows(["a"])
    bank.add("new", adapters["late"])
    bank.add("newer", adapters["b"])
    held |= {"new": adapters["late"], "newer": adapters["b"]}
    for name, place in (("new", a_place), ("newer", b_place)):  # rows of removed adapters are used again
        assert bank[name].block is place.block and bank[name].row == place.row
    assert torch.equal(rows(others), before)
    bank.remove("seven")
    del held["seven"]
    check()


def test_many_adapters_in_many_blocks_stay_apart(monkeypatch):
    monkeypatch.setattr("lit_llama.bank.BLOCK_BYTES", 1000)
    bank = Bank(base().config, start_layer=1)
    made = {f"user {i}": adapter(1 + i % 3, 1, i) for i in range(60)}
    for name, one in made.items():
        bank.add(name, one)
    assert len({id(slot.block) for slot in bank.values()}) > 20
    for name in list(made)[::7]:
        bank.remove(name)
        del made[name]
    for name, one in made.items():
        assert torch.equal(bank.adapter(name).state[PREFIX], one.state[PREFIX])


def test_any_order_of_changes_keeps_every_adapter_in_a_row_of_its_own(monkeypatch):
    monkeypatch.setattr("lit_llama.bank.BLOCK_BYTES", 1000)
    made, random = [adapter(1 + i % 3, 1, i) for i in range(6)], Random(0)
    bank, held = Bank(base().config, start_layer=1), {}
    for _ in range(300):
        name, one = f"user {random.randrange(30)}", random.choice(made)
        if name not in held:
            bank.add(name, one)
        elif random.random() < 0.5:
            bank.swap(name, one)
        else:
            bank.remove(name)
            del held[name]
            continue
        held[name] = one
        assert len({(id(slot.block), slot.row) for slot in bank.values()}) == len(held)
    assert list(bank) == list(held) and len({id(slot.block) for slot in bank.values()}) < 20  # rows are used again
    for name, one in held.items():
        assert all(torch.equal(bank.adapter(name).state[key], t) for key, t in one.state.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_bank_is_the_same_and_its_file_stays(folders, tmp_path, dtype):
    folder, adapters = folders["gqa"], adapters_of("gqa")
    bank, path = filled(folder, adapters, dtype=dtype), tmp_path / "many.safetensors"
    bank.remove("a")
    bank.add("näme", adapter(1, 1, 77, "beaver", **SHAPES["gqa"]))
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
    loaded.swap("seven", adapter(7, 1, 5, **SHAPES["gqa"]))
    loaded.swap("late", adapters["b"])
    loaded.remove("three")
    loaded.add("another", adapters["three"])
    assert path.read_bytes() == content
    loaded.save(path)
    again = Bank.load(path, folder)
    assert set(again) == {"late", "late three", "seven", "näme", "another"}
    assert torch.equal(again.adapter("late").state[PREFIX],
                       adapters["b"].state[PREFIX].to(dtype).float())  # fmt: skip


# == Mistakes ==


def test_unknown_names_are_answered_with_near_ones(folders):
    bank = filled(folders["mha"], {name: adapters_of("mha")["a"] for name in ("pirate", "polite", "json")})
    with pytest.raises(UserError, match=r"^There is no adapter named 'pirat' among the 3 of the bank; similar names "
                       r"are 'pirate'\.$"):  # fmt: skip
        bank.remove("pirat")
    with pytest.raises(UserError, match=r"no adapter named 'xyz' among the 3 of the bank; some names are '.*'\.$"):
        bank.swap("xyz", adapters_of("mha")["a"])
    model = load_with_bank(folders["mha"], bank)
    with pytest.raises(UserError, match="similar names are 'json'"), model.using(["json", "jsom"]):
        raise AssertionError
    model(token_ids(5, 3))  # nothing is left of the attempt
    with pytest.raises(UserError, match=r"no adapter named 'x' among the 0 of the bank\.$"):
        Bank(model.config).adapter("x")
    for call in (bank.swap, lambda name, _: bank.adapter(name), lambda name, _: bank.gather(["json", name])):
        with pytest.raises(UserError, match="no adapter named 'jso'"):
            call("jso", adapters_of("mha")["a"])


def test_names_are_given_once(folders):
    bank = filled(folders["mha"], {"pirate": adapters_of("mha")["a"]})
    for name in ("pirate", "base", ""):
        with pytest.raises(UserError, match=f"The name '{name}' is taken"):
            bank.add(name, adapters_of("mha")["b"])


def test_foreign_adapters_are_refused_and_change_nothing(folders):
    folder, good = folders["mha"], adapters_of("mha")["a"]
    bank = filled(folder, {"a": good})
    ours = base_fingerprint(folder)
    wide = {**good.state, PREFIX: torch.randn(1, 64)}
    short = {name: t for name, t in good.state.items() if ".2." not in name}
    foreign = {
        "is 64 wide and the base model in": AdapterFile(wide, good.meta, good.path),
        "with other weights": AdapterFile(good.state, {**good.meta, "base": {**ours, "weights": "0" * 16}}, good.path),
        r"was trained on a base with \{'n_kv_head': 2, 'qkv_bias': True\}": AdapterFile(
            good.state, {**good.meta, "base": base_fingerprint(folders["gqa"])}, good.path
        ),
        "made by the method 'lora'; a bank holds Aligners": AdapterFile(
            {}, {"method": "lora", "config": {}}, good.path
        ),
        "starts at layer 0, below the bank's start layer 1": adapter(1, 0, 1),
        r"does not fit the bank's base: transformer\.h\.2\.attn\.gating_factor is missing": AdapterFile(
            short, good.meta, good.path
        ),
    }
    for sentence, one in foreign.items():
        with pytest.raises(UserError, match=sentence):
            bank.add("b", one)
        with pytest.raises(UserError, match=sentence):
            bank.swap("a", one)
    assert list(bank) == ["a"] and torch.equal(bank.adapter("a").state[PREFIX], good.state[PREFIX])
    shapeless = Bank(bank.config, start_layer=1)
    with pytest.raises(UserError, match=r"global_value_embedding.weight is \(1, 64\), not \(1, 32\)"):
        shapeless.add("wide", AdapterFile(wide, good.meta, good.path))
    with pytest.raises(UserError, match="start_layer is 3; it must be from 0 to 2"):
        Bank(bank.config, start_layer=3)


def test_a_bank_of_another_base_is_refused(folders, tmp_path):
    path = tmp_path / "bank.safetensors"
    filled(folders["mha"], {"a": adapters_of("mha")["a"]}).save(path)
    with pytest.raises(UserError, match="was trained on a base with"):
        Bank.load(path, folders["gqa"])
    other = base(seed=5)
    save_base(tmp_path / "other", other.config, other.state_dict())
    with pytest.raises(UserError, match="with other weights"):
        Bank.load(path, tmp_path / "other")
    with pytest.raises(UserError, match="The bank is for a base of another shape"):
        load_with_bank(folders["gqa"], Bank.load(path))
    save_adapter(tmp_path / "a.safetensors", adapters_of("mha")["a"].state, {})
    for name, sentence in (("a.safetensors", "is not a bank"), ("none", "There is no file at")):
        with pytest.raises(UserError, match=sentence):
            Bank.load(tmp_path / name)
    anonymous = Bank(base().config)
    anonymous.save(path)
    with pytest.raises(UserError, match="was trained on a base with"):
        Bank.load(path, folders["gqa"])


def test_a_damaged_bank_is_refused_in_a_sentence(folders, tmp_path):
    bank, path = filled(folders["mha"], {"a": adapters_of("mha")["a"], "b": adapters_of("mha")["b"]}), tmp_path / "bank"
    bank.save(path)
    with safe_open(path, framework="pt") as file:
        header, tensors = json.loads(file.metadata()[META_KEY]), {key: file.get_tensor(key) for key in file.keys()}

    def names(value: object) -> dict[str, torch.Tensor]:
        return {"names.0": torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)}

    headers = [[], {}, *({k: v for k, v in header.items() if k != key} for key in header)]
    headers += [{**header, "config": {"n_layer": "3"}}, {**header, "config": {"depth": 3}}, {**header, "lengths": [2]}]
    headers += [{**header, "lengths": [1, 1]}, {**header, "base": {"weights": "0"}}, {**header, "start_layer": "x"}]
    headers += [
        {**header, "start_layer": 1.0},
        {**header, "start_layer": True},
        {**header, "lengths": 1},
        {**header, "start_layer": 5},
        {**header, "lengths": ["1"]},
    ]
    damaged = [(changed, tensors) for changed in headers]
    for value in ([], {}, [["a", "alpaca"]], [["a", "alpaca"]] * 2, [["a", 3], ["b", "alpaca"]], [["a"], ["b"]], 7,
                  [[[], "alpaca"], ["b", "alpaca"]], [[3, "alpaca"], ["b", "alpaca"]]):  # fmt: skip
        damaged.append((header, tensors | names(value)))
    for part in (torch.zeros(2, 5), torch.zeros(2, 40, dtype=torch.int32), torch.zeros(())):
        damaged.append((header, tensors | {"adapters.0": part}))
    for changed, parts in damaged:
        save_file(parts, path, metadata={META_KEY: json.dumps(changed)})
        with pytest.raises(UserError, match=r"bank.*\.$"):
            Bank.load(path, folders["mha"])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="is not a bank"):
        Bank.load(path)
    tensors["adapters.0"][1, -1] = torch.inf
    save_file(tensors, path, metadata={META_KEY: json.dumps(header)})
    loaded = Bank.load(path, folders["mha"])
    assert parse_sum("a", loaded) == (("a", 1.0),)
    with pytest.raises(UserError, match="The adapter 'b' of the bank holds numbers that are not finite"):
        parse_sum("a+b", loaded)


def test_a_batch_of_another_size_is_refused(folders):
    model = load_with_bank(folders["mha"], filled(folders["mha"], adapters_of("mha")))
    with model.using(["a", "b"]), pytest.raises(UserError, match="adapters for 2 rows, and the batch has 3"):
        model(token_ids(3, 4))
    assert model(token_ids(3, 4)).shape == (3, 4, 50)


# == The command line ==


@pytest.fixture
def trained(base_dir, tmp_path) -> dict[str, Path]:
    """Two adapters' folders of one base."""
    shape = dict(vocab_size=300, padded_vocab_size=None, n_kv_head=2, intermediate_size=48)
    paths = {}
    for seed, (name, style, length) in enumerate([("cat", "plain", 1), ("dog", "orca", 4)]):
        one = adapter(length, 1, seed, style, **shape)
        paths[name] = tmp_path / name
        save_adapter(paths[name] / "best.safetensors", one.state, {**one.meta, "base": base_fingerprint(base_dir)})
    return paths


def test_a_prompt_file_names_its_adapters(run_script, base_dir, trained, tmp_path):
    rows = [("the cat", "dog"), ("the dog and the hat", "cat"), ("a mat", None), ("a rat", "cat"), ("the mat", "base")]
    file, output = tmp_path / "rows.jsonl", tmp_path / "out.json"
    file.write_text("\n".join(json.dumps({"prompt": p} | ({"adapter": a} if a else {})) for p, a in rows))
    flags = ["--checkpoint_dir", base_dir, "--max_new_tokens", "8", "--temperature", "1"]
    bank = ["--bank", *trained.values(), "--use", "dog"]
    code, out, err = run_script("generate/aligner.py", *flags, *bank, "--prompt_file", file, "--output_file", output)
    assert code == 0, err
    said = json.loads(output.read_text())
    names = ["dog", "cat", "dog", "cat", "base"]
    assert [record["adapter"] for record in said] == names
    assert "> (cat) the dog and the hat" in out
    tokenizer = Tokenizer(base_dir)
    for row, ((text, _), name) in enumerate(zip(rows, names, strict=True)):
        style = get_prompt_style({"cat": "plain", "dog": "orca", "base": "plain"}[name])
        model = load_model(base_dir, None if name == "base" else open_bank([trained[name]], base_dir).adapter(name))
        sampling = Sampling(8, 1.0, seed=1234)
        (expected,) = answer(model, tokenizer, [style.render(text)], sampling, style.stop, 1, style.continues, [row])
        assert said[row]["response"] == expected


def test_a_banks_file_serves_the_command_line(run_script, base_dir, trained, tmp_path):
    open_bank(list(trained.values()), base_dir).save(tmp_path / "both.safetensors")
    flags = ["--checkpoint_dir", base_dir, "--max_new_tokens", "5", "--prompt", "the cat", "the dog"]
    flags += ["--use", "cat", "dog"]
    _, from_folders, _ = run_script("generate/aligner.py", *flags, "--bank", *trained.values())
    _, from_file, _ = run_script("generate/aligner.py", *flags, "--bank", tmp_path / "both.safetensors")
    assert from_file == from_folders and from_file.count("> (") == 2
    _, compared, _ = run_script("generate/aligner.py", *flags, "--bank", *trained.values(), "--compare_base")
    assert compared.count("aligned: ") == compared.count("base:") == 2


def test_sums_strengths_and_the_chat_with_a_bank(run_script, base_dir, trained):
    flags = ["--checkpoint_dir", base_dir, "--max_new_tokens", "8", "--prompt_style", "plain"]
    bank, prompt = ["--bank", *trained.values()], ["--prompt", "the cat"]

    def answers(*more: object, stdin: str = "") -> str:
        code, out, err = run_script("generate/aligner.py", *flags, *more, stdin=stdin)
        assert code == 0, err
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


def test_mistakes_of_the_command_line_get_one_line(refused, base_dir, trained, tmp_path):
    flags = ["--checkpoint_dir", base_dir, "--bank", *trained.values(), "--prompt", "the cat", "the dog", "a rat"]
    assert "no adapter named 'cot' among the 2 of the bank; similar names are 'cat'" in refused(
        "generate/aligner.py", *flags, "--use", "cot"
    )
    assert "3 prompts and 2 names in --use" in refused("generate/aligner.py", *flags, "--use", "cat", "dog")
    assert "--strength takes one number for all" in refused("generate/aligner.py", *flags, "--strength", "0.5", "1")
    assert "no adapter named 'dog:x' among the 2" in refused("generate/aligner.py", *flags, "--use", "cat+dog:x")
    assert "give --bank too" in refused("generate/aligner.py", "--use", "cat")
    twin = tmp_path / "twin" / "cat"
    shutil.copytree(trained["cat"], twin)
    assert "The name 'cat' is taken" in refused("generate/aligner.py", *flags, "--bank", trained["cat"], twin)
    with pytest.raises(UserError, match="There is no adapter at"):
        open_bank([tmp_path / "none"], base_dir)
    Bank(LLaMAConfig.from_json(base_dir / "lit_config.json"), base_dir).save(tmp_path / "empty.safetensors")
    assert "has no adapters" in refused("generate/aligner.py", *flags[:2], "--bank", tmp_path / "empty.safetensors")


def test_prompts_that_name_adapters_need_a_bank(run_script, base_dir, trained, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "the cat", "adapter": "dog"}\n')
    flags = ["--checkpoint_dir", base_dir, "--adapter", trained["cat"], "--max_new_tokens", "4"]
    code, out, err = run_script("generate/aligner.py", *flags, "--prompt_file", file)
    assert code == 0 and "are ignored; they need generate/aligner.py --bank" in err
    assert out == run_script("generate/aligner.py", *flags, "--prompt", "the cat")[1]
