"""Structured files from untrusted sources: an error names the file, the field, its value and what was expected."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lit_llama.storage.schema import check, depth, field, parse_json, read_bytes, read_json
from lit_llama.utils import UserError

ROOT = Path(__file__).parent.parent

REFUSED = {
    "is not JSON: Expecting ',' delimiter in line 2": b'{"a": 1\n',
    "is not JSON: Expecting value": b"",
    "holds a list; expected an object": b"[1]",
    "holds null; expected an object": b"null",
    "is not text in UTF-8 (byte 8)": b'{"a": "\xff"}',
    "holds one half of a surrogate pair": rb'{"a": "\uD800"}',
    "is nested too deeply": b"[" * 100_000,
    "nested too deeply: more than 64 levels": b'{"a":' * 65 + b"1" + b"}" * 65,
    "holds a number with thousands of digits": b'{"a": ' + b"1" * 5001 + b"}",
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_texts_that_are_refused(sentence, tmp_path):
    (tmp_path / "a.json").write_bytes(REFUSED[sentence])
    with pytest.raises(UserError) as error:
        read_json(tmp_path / "a.json")
    assert str(error.value).startswith(f"{tmp_path}/a.json ") and sentence in str(error.value)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(value=values, ascii=st.booleans())
@example(value={"a": "\U0001f600"}, ascii=True)  # a complete surrogate pair
def test_any_json_round_trips(value, ascii):
    assert parse_json(json.dumps({"a": value}, ensure_ascii=ascii), "text") == {"a": value}


def test_depth():
    assert depth(1) == depth([]) == 0
    assert depth([1]) == 1 and depth({"a": [{"b": 1}], "c": []}) == 3


def test_a_byte_order_mark_is_ignored(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"^There is no configuration at .*/a\.json\.$"):
        read_json(tmp_path / "a.json", what="configuration")
    with pytest.raises(UserError, match="is a folder, not a file"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a device or a pipe, not a file"):
        read_json(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"123456")
    with pytest.raises(UserError, match="has 6 bytes; expected a file of at most 5"):
        read_bytes(tmp_path / "large", limit=5)


def test_another_user_s_file_is_no_damaged_one(error_for_another_user):
    path, error = error_for_another_user("from lit_llama.storage.schema import read_json", "read_json(path)", 0o600)
    assert error == f"You have no permission to read {path}; change its owner or mode, or copy it.\n"


FIELDS = [
    (True, int, "true; expected a whole number"),
    (1, bool, "1; expected true or false"),
    (2**64, int, "18446744073709551616; expected a whole number from 1 up to 1,000"),
    (10**5000, int, "a number with thousands of digits; expected"),
    (float("nan"), float, "NaN; expected a number from 1"),
    (float("inf"), float, "Infinity; expected a number"),
    ([1], str | None, "a list; expected text or null"),
    ("x" * 99, int, "... (101 characters); expected a whole number"),
    ("\x1b[31m", int, r'"\u001b[31m"; expected'),
]


@pytest.mark.parametrize("value, kind, sentence", FIELDS, ids=range(len(FIELDS)))
def test_invalid_values_are_refused(value, kind, sentence):
    limits = dict(least=1, most=1000) if kind in (int, float) and value is not True else {}
    with pytest.raises(UserError) as error:
        field({"a": value}, "a", kind, "x.json", **limits)
    assert str(error.value).startswith("x.json: a is ") and sentence in str(error.value)


def test_fields():
    data = {"a": 3, "b": None, "c": 0.5}
    assert field(data, "a", int, "f", least=3, most=3) == 3 == field(data, "a", float, "f")
    assert field(data, "b", int, "f", 7) == 7 == field(data, "z", int, "f", 7)
    assert field(data, "b", int | None, "f") is None
    assert check(0.5, float, "f", most=1) == 0.5
    for number in (2**63, -(2**63), 10**400):  # would overflow in floats, NumPy or torch
        for kind in (int, float, int | None):
            with pytest.raises(UserError, match="expected"):
                check(number, kind, "f")
    with pytest.raises(UserError, match=r"^f has no z\.$"):
        field(data, "z", int, "f")
