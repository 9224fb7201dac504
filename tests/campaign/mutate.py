"""Damage the content of files at random: their bytes, their text, and the values in their format."""

import gzip
import io
import json
import random
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import torch
import yaml
from safetensors.torch import load, save

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**64, -(2**63) - 1, 10**7, 10**9, 10**400, 3 * 10**400, 0.5, -0.5,
    1.0, 2.0, 1e308, float("nan"), float("inf"), -float("inf"), "", " ", "x", "1", "\ud800", "\x1b[31m\x00", "a\u2028b",
    "a\r\nb", "../../secret", "/etc/passwd", "/dev/zero", "x" * 5000,
    "é" * 300, [], {}, [[]], [None], {"": None}, ["x", 1], {"x": {"y": [1]}},
)  # fmt: skip
SPLICES = (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x00", b"{", b"}", b"[" * 3000, b"]", b'"', b"1" * 5001, b"\n",
           b"NaN", b"-", b"\r\n", b"\r", b"\x1b[31m", b"\xff\xfe", b"\xef\xbb\xbf", b"&a [*a]",
           b"!!python/name:os.x", b",", b"\xe2\x80\xa8")  # fmt: skip


TAGGED = ("!!bool x", "!!int ''", "!!float ''", "!!timestamp x", "!!binary =", "!!set {a}", "!!omap [a]", "!!str [a]",
          "{a: b}", "[[a]]", '"a\\0b"', "2026-01-01", "2026-99-99", "0o9", "1:99", "=", "|\n  1", "~", "x",
          "[~]")  # fmt: skip


def mutate(rng: random.Random, content: bytes, suffix: str, others: list[bytes]) -> tuple[str, bytes]:
    """Return the name of a mutation and the damaged content.

    Args:
        rng: Random numbers.
        content: Content of a file.
        suffix: Its format, such as ".json".
        others: Contents of files of other formats.
    """
    if suffix == ".gz" and rng.random() < 0.7:
        name, inner = mutate(rng, gzip.decompress(content), ".json", others)
        return f"gz {name}", gzip.compress(inner)
    values = VALUES.get(suffix)
    if values is not None and rng.random() < 0.7:
        return "values", values(rng, content)
    kind = rng.choice(("cut", "flip", "splice", "splice", "move", "empty", "other", "large", "encoding"))
    return kind, damage(rng, content, kind, others)


def damage(rng: random.Random, content: bytes, kind: str, others: list[bytes]) -> bytes:
    i, j = sorted((rng.randint(0, len(content)), rng.randint(0, len(content))))
    if rng.random() < 0.3:  # most of the structure is in the header
        i, j = min(i, 40), min(j, 200)
    if kind == "cut":
        return content[:i]
    if kind == "flip":
        damaged = bytearray(content)
        for index in range(i, min(i + rng.choice((1, 1, 4, 64)), len(content))):
            damaged[index] = rng.randrange(256)
        return bytes(damaged)
    if kind == "splice":
        return content[:i] + rng.choice(SPLICES) + content[rng.choice((i, j)) :]
    if kind == "move":
        return content[:i] + content[j:] + content[i:j] if rng.random() < 0.5 else content[:j] + content[i:]
    if kind == "other":
        return rng.choice(others)
    if kind == "encoding":
        text = content.decode("latin-1")
        return rng.choice(
            (b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n"), text.encode("utf-16"), content[:1])
        )
    return (
        b""
        if kind == "empty"
        else rng.choice((b"\xff" * 8, b"\x00\x00\x00\x00\x00\x00\x00\x7f", b"\x10")) + content[8:]
    )


def change_tree(rng: random.Random, value: Any, odd: tuple[Any, ...] = ODD) -> Any:
    """Return a copy of nested lists and objects with one change: a value, a name, or an added or removed entry."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return nest(rng) if rng.random() < 0.05 else rng.choice(odd)
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
    action = rng.random()
    if action < 0.1:
        del copy[key]
    elif action < 0.15 and isinstance(copy, dict):
        copy[rng.choice(("", "x", "__metadata__", f"{key}2"))] = copy.pop(key)
    elif action < 0.2 and isinstance(copy, list):
        copy += copy[: rng.randint(1, 3)]
    else:
        copy[key] = change_tree(rng, copy[key], odd) if rng.random() < 0.8 else rng.choice(odd)
    return copy


def nest(rng: random.Random) -> Any:
    value: Any = 1
    for _ in range(rng.choice((60, 70, 200))):
        value = {"a": value} if rng.random() < 0.5 else [value]
    return value


def change_json(rng: random.Random, content: bytes) -> bytes:
    try:
        text = dump(change_tree(rng, json.loads(content)))
        if rng.random() < 0.1 and text.startswith(b'{"'):  # a duplicate name
            text = text[:1] + text[1:].partition(b":")[0] + b":" + dump(rng.choice(ODD)) + b"," + text[1:]
        return text
    except ValueError:  # JSON lines
        lines = [json.loads(line) for line in content.decode().split("\n") if line.strip()]
        return b"".join(dump(row) + b"\n" for row in change_lines(rng, lines))


def change_lines(rng: random.Random, rows: list[Any]) -> list[Any]:
    i = rng.randrange(len(rows))
    return [*rows[:i], change_tree(rng, rows[i]), *rows[i + 1 :]]


def dump(value: Any) -> bytes:
    huge, text = str(10**400), json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace(huge, "7" * 5001).encode("utf-8", "surrogatepass" if len(text) % 2 else "backslashreplace")


def change_yaml(rng: random.Random, content: bytes) -> bytes:
    value = yaml.safe_load(content)
    if rng.random() < 0.3:
        return f"{rng.choice(list(value))}: {rng.choice(TAGGED)}\n".encode()
    return yaml.safe_dump(change_tree(rng, value)).encode("utf-8", "surrogatepass")


def change_csv(rng: random.Random, content: bytes) -> bytes:
    lines = content.decode().splitlines(keepends=True)
    i = rng.randrange(len(lines))
    cells = lines[i].rstrip("\n").split(",")
    cells[rng.randrange(len(cells))] = str(rng.choice(ODD)).replace(str(10**400), "9" * 5001)
    lines[i] = rng.choice((",".join(cells) + "\n", "", lines[i] * 2, lines[i].rstrip("\n"), '"' + lines[i]))
    return "".join(lines).encode("utf-8", "surrogatepass")


def change_tensor(rng: random.Random, t: torch.Tensor) -> torch.Tensor:
    """Return a tensor with other numbers, another dtype or another shape."""
    t = t.clone()
    if t.is_floating_point() and t.numel() and rng.random() < 0.4:
        t.view(-1)[rng.randrange(t.numel())] = rng.choice((float("nan"), float("inf"), 1e38, -1e30))
        return t
    return rng.choice((
        t.double, t.half, t.bfloat16, t.int, t.bool, t[:0].clone, t[:-1].clone, t.flatten, t.unsqueeze(0).clone,
        lambda: torch.zeros(()), lambda: torch.cat((t, t)), lambda: t.T.contiguous() if t.dim() == 2 else t,
    ))()  # fmt: skip


def change_safetensors(rng: random.Random, content: bytes) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    if rng.random() < 0.4:
        tensors = load(content)
        name = rng.choice(list(tensors))
        change = rng.random()
        if change < 0.2:
            tensors[rng.choice(("x", name + "x", "transformer.h.x.attn.gating_factor", "transformer.h.9999.a"))] = (
                tensors[name]
            )
        if change < 0.3:
            del tensors[name]
        else:
            tensors[name] = change_tensor(rng, tensors[name])
        return save(tensors, header.get("__metadata__"))
    metadata = header.get("__metadata__", {})
    entries = [name for name, text in metadata.items() if text.startswith("{")]
    if entries and rng.random() < 0.7:
        entry = rng.choice(entries)
        metadata[entry] = dump(change_tree(rng, json.loads(metadata[entry]))).decode("utf-8", "surrogatepass")
    else:
        header = change_tree(rng, header)
    text = dump(header)
    return len(text).to_bytes(8, "little") + text + data


def change_pickle(rng: random.Random, content: bytes) -> bytes:
    """Return a file of `torch.save` with one value or tensor changed."""
    value = torch.load(io.BytesIO(content), weights_only=True)
    odd = (
        *ODD,
        torch.ones(3),
        torch.zeros(()),
        torch.ones(1).expand(10**9, 4),
        torch.ones(2).to_sparse(),
        {"x": torch.ones(1)},
    )
    tensors = [name for name, t in value.items() if isinstance(t, torch.Tensor)] if isinstance(value, dict) else []
    if tensors and rng.random() < 0.5:
        name = rng.choice(tensors)
        value[name] = change_tensor(rng, value[name])
    else:
        value = change_tree(rng, value, odd)
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def change_table(rng: random.Random, table: pa.Table) -> pa.Table:
    """Return a table with a column removed, renamed or changed, or with fewer rows."""
    i = rng.randrange(table.num_columns)
    name, n = table.column_names[i], table.num_rows
    action = rng.randrange(5)
    if action == 0:
        return table.drop_columns([name])
    if action == 1:
        return table.rename_columns([f"{c}x" if c == name else c for c in table.column_names])
    if action == 2:
        return table.slice(0, rng.choice((0, n // 2)))
    value = rng.choice((None, 7, -1, "x", [], [10**9], [0.5], [-1, 0], [None], {"a": 1}, 2**40))
    values: list[Any] = [value] * n
    if action == 3:
        values = [*table.column(i).to_pylist()[:-1], values[-1]]
    try:
        return table.set_column(i, name, pa.array(values, table.schema.field(i).type if action == 4 else None))
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return table.set_column(i, name, pa.array([None] * n))


def change_parquet(rng: random.Random, content: bytes) -> bytes:
    file = io.BytesIO()
    pa.parquet.write_table(change_table(rng, pa.parquet.read_table(io.BytesIO(content))), file)
    return file.getvalue()


def change_arrow(rng: random.Random, content: bytes) -> bytes:
    table = change_table(rng, pa.ipc.open_stream(content).read_all())
    file = io.BytesIO()
    if rng.random() < 0.3:
        table = table.replace_schema_metadata({"huggingface": dump(rng.choice(ODD))})
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def change_sentencepiece(rng: random.Random, content: bytes) -> bytes:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    spec = ModelProto.FromString(content)
    piece = spec.pieces[rng.randrange(min(len(spec.pieces), rng.choice((4, 300, 10**6))))]
    number = rng.choice((-1, 0, 1, 2, 5, 10**6, 2**31 - 1))
    rng.choice((
        lambda: setattr(piece, "piece", rng.choice(("", "<s>", "a", "\x00", "x" * 999))),
        lambda: setattr(piece, "type", rng.randint(1, 6)),
        lambda: setattr(piece, "score", rng.choice((float("nan"), 1e38, 0.0))),
        lambda: spec.pieces.remove(piece),
        lambda: setattr(spec.trainer_spec, rng.choice(("unk_id", "bos_id", "eos_id", "pad_id", "vocab_size")), number),
        lambda: setattr(spec.trainer_spec, "model_type", rng.randint(1, 4)),
        lambda: setattr(spec.trainer_spec, "byte_fallback", False),
        lambda: setattr(spec.normalizer_spec, "precompiled_charsmap", rng.randbytes(rng.choice((1, 4, 100)))),
        lambda: setattr(spec.trainer_spec, rng.choice(("eos_piece", "unk_piece")), rng.choice(("", "a"))),
        lambda: spec.ClearField(rng.choice(("pieces", "trainer_spec", "normalizer_spec"))),
    ))()  # fmt: skip
    return spec.SerializePartialToString()


VALUES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".json": change_json, ".jsonl": change_json, ".yaml": change_yaml, ".csv": change_csv, ".pth": change_pickle,
    ".pt": change_pickle, ".bin": change_pickle, ".safetensors": change_safetensors, ".parquet": change_parquet,
    ".arrow": change_arrow, ".model": change_sentencepiece,
}  # fmt: skip
