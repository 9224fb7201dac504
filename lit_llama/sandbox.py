"""The environment in which chat templates run: Jinja's sandbox with the names that transformers gives templates."""

import ctypes
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from lit_llama.chat_template import GUARD, Refusal

MOST_REPEATED = 1_000_000  # characters or items of a product such as "-" * 80
MOST_BITS = 1_000_000  # of a power
MOST_SECONDS = 10.0  # of a rendering
MOST_BYTES = 2**30  # that a rendering may add to the process's memory


class TooLong(Exception):
    """A template runs too long."""


@contextmanager
def limited(memory: bool = True) -> Iterator[None]:
    """Limit the time and, on Linux, the memory of a block, because a template may nest loops and long texts.

    Args:
        memory: Limit the memory. The limit is that of the process, so no other thread may allocate meanwhile.

    Raises:
        TooLong: The block ran for more than `MOST_SECONDS`.
        MemoryError: It needed more than `MOST_BYTES`.
    """
    import resource

    ended, lock, thread = False, threading.Lock(), ctypes.c_ulong(threading.get_ident())

    def interrupt() -> None:
        with lock:
            if not ended:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TooLong))

    timer, before = threading.Timer(MOST_SECONDS, interrupt), resource.getrlimit(resource.RLIMIT_AS)
    timer.daemon = True
    timer.start()
    try:
        if memory:
            with suppress(OSError, ValueError):  # not Linux, or the user has set a lower limit
                pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
                resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, before[1]))
        yield
    finally:
        with lock:
            ended = True
        timer.cancel()
        if memory:
            resource.setrlimit(resource.RLIMIT_AS, before)


class GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}`, with which some templates mark the model's text: only its content."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox; it rejects products and powers that would fill the memory."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        is_power = operator == "**" and isinstance(left, int) and isinstance(right, int)
        if is_power and abs(right) * left.bit_length() > MOST_BITS:
            raise SecurityError("a power is too large")
        for sequence, times in ((left, right), (right, left)) if operator == "*" else ():
            if hasattr(sequence, "__len__") and isinstance(times, int) and len(sequence) * times > MOST_REPEATED:
                raise SecurityError("a product is too large")
        return super().call_binop(context, operator, left, right)


def refuse(message: str) -> NoReturn:
    raise Refusal(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without the escapes for HTML that Jinja's own filter adds."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return text.replace("\\ufdd0", GUARD)


def make_environment() -> Environment:
    """Return the environment."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


@lru_cache(16)
def program(source: str) -> Template:
    """Return a template, ready to run."""
    return make_environment().from_string(source)


@lru_cache(16)
def variables_of(source: str) -> set[str]:
    """Return the names of the variables that a template reads, without those that the environment defines."""
    environment = make_environment()
    return meta.find_undeclared_variables(environment.parse(source)) - environment.globals.keys()
