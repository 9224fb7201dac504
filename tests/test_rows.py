"""Reading rows and prompts from files."""

import gzip
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lit_llama.answering import Request, read_requests
from lit_llama.storage.rows import origin, read_rows, text_field
from lit_llama.utils import UserError

ROWS = [{"instruction": "Say é", "output": "line one\nline two\u2028\x85"}, {"instruction": "", "output": "{braces}"}]


def test_every_format_gives_the_same_rows(tmp_path):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    (tmp_path / "marked.json").write_text(json.dumps(ROWS), encoding="utf-8-sig")
    (tmp_path / "lines.jsonl").write_text(f"\n{lines}\n\n", encoding="utf-8")
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "LINES.JSONL.GZ").write_bytes(gzip.compress(lines.encode()))
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "table.parquet")
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "TABLE.PARQUET")
    for path in tmp_path.iterdir():
        assert read_rows(path) == ROWS, path


def test_only_rows_of_the_hub_have_a_repository(tmp_path):
    assert origin(tmp_path / "rows.jsonl", "me/rows") == {"source": str(tmp_path / "rows.jsonl")}
    assert origin(None, str(tmp_path)) == {"source": str(tmp_path)}
    assert origin(None, "me/rows") == {"source": "me/rows", "repo_id": "me/rows"}
    assert origin(None, "me/rows", config_name="main", revision="v0") == {
        "source": "me/rows, config main, revision v0", "repo_id": "me/rows", "config_name": "main", "revision": "v0",
    }  # fmt: skip


json_values = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text(), max_size=2)


json_rows = st.lists(st.dictionaries(st.text(), json_values, max_size=3), min_size=1, max_size=4)


@given(rows=json_rows, ascii=st.booleans(), lines=st.booleans())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@example(rows=[{"\u2028": "\u2029\x0b\x0c\x1c\x85"}], ascii=False, lines=True)
def test_json_values_survive_a_round_trip(tmp_path, rows, ascii, lines):
    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=ascii)

    path = tmp_path / "rows"
    path.write_text("\n".join(map(dump, rows)) if lines else dump(rows), encoding="utf-8")
    assert read_rows(path) == rows


MALFORMED: dict[str, tuple[str, bytes]] = {
    "line 2 is not JSON": ("a.jsonl", b'{"a": 1}\n{"a": \n{"a": 3}\n'),
    "in line 3": ("a.json", b'[{"a": 1},\n{"a": 2},\n{"a" 3}]'),
    "one JSON list, or one object per line": ("a.json", b'{\n"data": []\n}'),
    "cannot be read as text": ("a.json", b'[{"a": "\xff\xfe"}]'),
    "cannot be read as text (Not a gzipped file": ("a.jsonl.gz", b'{"a": 1}'),
    "cannot be read as text (Compressed file ended": ("b.jsonl.gz", gzip.compress(b'{"a": 1}' * 99)[:-12]),
    "cannot be read as text (Error -3": ("c.jsonl.gz", gzip.compress(b'{"a": 1}')[:10] + b"\xff" * 30),
    "is not a parquet file": ("a.parquet", b"PAR1 or not"),
    "line 1 is nested too deeply": ("deep.jsonl", b'{"a": ' * 100_000),
    "deep.json is nested too deeply": ("deep.json", b"[" * 100_000),
    "a number with thousands of digits": ("digits.json", b'[{"a": ' + b"9" * 5001 + b"}]"),
}


@pytest.mark.parametrize("sentence", MALFORMED)
def test_malformed_files(sentence, tmp_path):
    name, content = MALFORMED[sentence]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_rows(tmp_path / name)
    assert sentence in str(error.value) and name in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"There is no data file at .*rows\.json"):
        read_rows(tmp_path / "rows.json")


def test_text_field_returns_texts_and_refuses_other_values():
    row = {"a": "text", "empty": "", "null": None, "zero": 0, "list": []}
    assert [text_field(row, 1, name) for name in ("a", "empty")] == ["text", ""]
    assert [text_field(row, 1, name, default="-") for name in ("a", "empty", "null", "absent")] == [
        "text",
        "",
        "-",
        "-",
    ]
    for bad, name, default, sentence in (
        (row, "absent", None, "Row 7 has no field 'absent'; it has 'a', 'empty', 'null', 'zero', 'list'."),
        ({}, "a", None, "Row 7 has no field 'a'; it has none."),
        (row, "null", None, "Row 7: 'null' is not text but null."),
        (row, "zero", "", "Row 7: 'zero' is not text but int."),
        (row, "list", "", "Row 7: 'list' is not text but list."),
        ({"a": "\ud83d"}, "a", None, "Row 7: 'a' holds one half of a surrogate pair, which is not a character."),
        ([1], "a", None, "Row 7 is not an object with named fields but list."),
    ):
        with pytest.raises(UserError) as error:
            text_field(bad, 7, name, default)
        assert str(error.value) == sentence


# == prompt files ==


def test_a_text_file_has_one_prompt_per_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\u2028and more\r\n\n  two \n".encode())
    assert read_requests(path) == [Request("one\u2028and more"), Request("two")]


def test_prompt_rows_are_recognized_by_file_extension_in_any_case(tmp_path):
    for name in ("a.json", "A.JSON", "a.JsonL", "A.JSONL"):
        (tmp_path / name).write_text('{"prompt": "one", "question_id": 3}\n', encoding="utf-8-sig")
        assert read_requests(tmp_path / name) == [Request("one", id=3)]


@pytest.mark.parametrize(("question_id", "reason"), [
    ('"\\ud800"', "Row 1: 'question_id' holds one half of a surrogate pair"),
    ("{}", "Row 1: question_id is an object; expected a whole number or text or null"),
])  # fmt: skip
def test_ids_that_cannot_be_written_are_refused(tmp_path, question_id, reason):
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "one", "question_id": {question_id}}}\n', encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        read_requests(tmp_path / "a.jsonl")


def test_the_path_of_a_prompt_file_is_named_once(tmp_path):
    path = tmp_path / "absent.json"
    with pytest.raises(UserError) as error:
        read_requests(path)
    assert str(error.value).startswith(f"There is no data file at {path}")


def test_prompt_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"caf\xe9")
    for name, reason in (("bytes.txt", "cannot be read as text"), ("absent.txt", "There is no file"), ("", "a folder")):
        with pytest.raises(UserError, match=reason):
            read_requests(tmp_path / name)
