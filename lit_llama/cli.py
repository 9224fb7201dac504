"""Command-line interfaces from dataclasses of settings.

`parse(Settings)` gives a script a flag for each field of its settings (lit_llama/settings.py), with a type check, a
default and a line in `--help`. A YAML file given with `--config` can set the same fields. A tuple takes several values;
a field named `files` takes the positional arguments. Scripts call `parse` before they import PyTorch, which takes
seconds, so that `--help` and error messages appear at once. `run(main, settings)` then does the work.
"""

import inspect
import json
import sys
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jsonargparse import ActionConfigFile, ArgumentParser

from lit_llama.console import did_you_mean, exit_on_user_error, hide_interrupts
from lit_llama.settings import Setting, check_config, check_environment, describe, from_parsed, metavar
from lit_llama.threads import wait_briefly
from lit_llama.utils import UserError, check_text, log

S = TypeVar("S")
hide_interrupts()  # scripts import this module first
wait_briefly()


@exit_on_user_error()
def run(main: Callable[[S], Any], settings: S) -> None:
    """Call `main` with the settings; a `UserError` ends the process with one line and exit code 1."""
    main(settings)


@exit_on_user_error()
def parse(settings_class: type[S], args: Sequence[str] | None = None) -> S:
    """Return the settings of a command line (default: `sys.argv`).

    An invalid command line ends the process with one line and exit code 2, a value out of range with exit code 1.
    """
    check_environment()
    parser, settings = make_parser(settings_class), {setting.name: setting for setting in describe(settings_class)}
    args = [check_text(arg, "The command line") for arg in (sys.argv[1:] if args is None else args)]
    flags = [f"--{name}" for name in (*settings, "config", "print_config", "help")]
    try:
        for word, following in pairwise([*args, "--"]):
            flag, _, value = word.partition("=")
            if flag.startswith("--") and flag not in flags:
                usage_error(parser, f"There is no flag {flag}{did_you_mean(flag, flags)}")
            if flag == "--config" and not (value or following).startswith("--"):
                check_config(Path(value or following), settings)
        values = parser.parse_args(join_repeated(args, [f"--{s.name}" for s in settings.values() if s.several]))
    except (ArgumentError, UserError, RecursionError, OverflowError) as error:
        usage_error(parser, explain(getattr(error, "message", str(error)), settings))
    return settings_class(**{name: from_parsed(values[name]) for name in settings})


def make_parser(settings_class: type) -> ArgumentParser:
    """Return the parser of a script's settings; its description is the docstring of the script."""
    module = inspect.getmodule(settings_class)
    script = Path(inspect.getfile(settings_class))
    prog = f"python {script.parent.name}/{script.name}"
    settings = describe(settings_class)
    files = "FILE ... " if any(setting.name == "files" for setting in settings) else ""
    usage = f"{prog} {files}[--config FILE] [--NAME VALUE ...]"
    parser = ArgumentParser(prog=prog, usage=usage, description=module.__doc__, exit_on_error=False, allow_abbrev=False,
                            formatter_class=RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--config", metavar="FILE", action=ActionConfigFile, help="YAML file with any settings below")
    groups = {group: parser.add_argument_group(group) for group in dict.fromkeys(s.group for s in settings)}
    for setting in settings:
        add_setting(groups[setting.group], setting)
    return parser


def add_setting(group: Any, setting: Setting) -> None:
    """Add the flag of a setting to a group of the parser."""
    # `--resume` alone is `--resume true`
    options = {"nargs": "?", "const": True} if setting.type is bool and not setting.several else {}
    options |= {"nargs": "*" if setting.may_be_empty else "+"} if setting.several else {}
    if setting.name == "files":
        group.add_argument("files", type=setting.type, help=setting.comment, metavar="FILE", **options)
        return
    default = list(setting.default) if setting.several else setting.default
    shown = "" if default in (None, "", []) else f" (default: {json.dumps(default, default=str)})".replace('"', "")
    options |= {"help": f"{setting.comment}{shown}".replace("%", "%%"), "metavar": metavar(setting.type)}
    group.add_argument(f"--{setting.name}", type=setting.type, default=default, **options)


def explain(message: str, settings: dict[str, Setting]) -> str:
    """Return one sentence for an error of jsonargparse: the setting, what was expected and the value."""
    name = message.replace('"', "'").partition("'")[2].partition("'")[0]
    if name in settings and "alue: " in message:
        return f"--{name}: expected {metavar(settings[name].type)}, got {message.rpartition('alue: ')[2]!r}"
    return " ".join(message.split())


def usage_error(parser: ArgumentParser, message: str) -> NoReturn:
    log(f"error: {message} (see {parser.prog} --help)")
    sys.exit(2)


def join_repeated(args: Sequence[str], several: Sequence[str]) -> list[str]:
    """Rewrite `--adapter a --adapter b` as `--adapter a b` for flags of several values; keep a single `--prompt=-x`."""
    others: list[str] = []
    joined: dict[str, list[str]] = {}
    current = others
    for arg in args:
        name, has_value, value = arg.partition("=")
        if name in several:
            current = joined.setdefault(name, [])
            current += [value] if has_value else []
        else:
            current = others if arg.startswith("--") else current
            current.append(arg)
    for name, values in joined.items():
        alone = f"{name}={values[0]}" if len(values) == 1 else None
        others += [alone] if alone in args else [name, *values]
    return others
