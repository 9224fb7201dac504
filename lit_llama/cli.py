"""Command lines made from the commented constants at the top of a script.

A script says each setting once:

    learning_rate: float = 9e-3  # peak learning rate, above 0

and gets `--learning_rate`, its type check, its default and its line in `--help` from that, and the same key in a
YAML file given with `--config`. A comment line `# == Optimiser ==` starts a group. A constant named `files` is what
stands on the command line without a flag, one or more.

A script that does what another does with a few settings of its own names that script, and the group that is not for it:

    INHERITS = (finetune.aligner, "Aligner")

Its own constants replace those of the same name; new ones stand where the dropped group stood.
"""

import ast
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn, get_args, get_origin

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace

from lit_llama.utils import UserError, log


@dataclass
class Setting:
    """One constant of a script: its name, type, default value, comment and group."""

    name: str
    type: Any
    default: Any
    help: str
    group: str


def read_settings(script: Path, names: dict[str, Any]) -> list[Setting]:
    """The annotated constants above the first function of a script, among those that it inherits.

    Args:
        script: the file.
        names: the script's globals, which the types and the default values come from.
    """
    source = Path(script).read_text(encoding="utf-8")
    lines = source.splitlines()
    settings, group, seen = [], "Settings", 0
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            break
        for line in lines[seen : node.lineno]:
            if match := re.fullmatch(r"# == (.+) ==", line.strip()):
                group = match[1]
        seen = node.end_lineno
        if isinstance(node, ast.AnnAssign):
            name = node.target.id
            comment = lines[node.end_lineno - 1][node.end_col_offset :].strip().lstrip("# ")
            settings.append(Setting(name, eval(ast.unparse(node.annotation), names), names[name], comment, group))
    if "INHERITS" not in names:
        return settings
    parent, dropped = names["INHERITS"]
    inherited = read_settings(Path(parent.__file__), vars(parent))
    place = next(i for i, setting in enumerate(inherited) if setting.group == dropped)
    inherited = [setting for setting in inherited if setting.group != dropped]
    own = {setting.name: setting for setting in settings}
    new = [setting for setting in settings if setting.name not in {s.name for s in inherited}]
    merged = [own.get(setting.name, setting) for setting in inherited]
    return [*merged[:place], *new, *merged[place:]]


class HelpFormatter(DefaultHelpFormatter):
    """Defaults as they would be written in a YAML file; what a value looks like stands beside the flag."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=34, **kwargs)

    def _get_help_string(self, action: Any) -> str:
        if action.dest == "print_config":
            return "print all settings as YAML and exit"
        if action.dest in ("help", "config") or action.default in (None, ""):
            return action.help
        return f"{action.help} (default: {json.dumps(action.default, default=str)})".replace('"', "")


class Parser(ArgumentParser):
    several: tuple[str, ...] = ()  # the flags that take several values

    def parse_args(self, args: list[str] | None = None, **kwargs: Any) -> Namespace:
        return super().parse_args(join_repeated(sys.argv[1:] if args is None else args, self.several), **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One line without the usage, and exit code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        message = re.sub(r'^Parser key "([^"]*)":\s*', r"--\1: ", message)
        message = re.sub(r"<class '([\w.]+\.)?(\w+)'>", r"\2", message)
        message = re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", message)
        message = " ".join(message.split())
        message = re.sub(r"Does not validate against any of .*? Errors: - (.*) - Expected a NoneType", r"\1.", message)
        log(f"error: {message} (see {self.prog} --help)")
        sys.exit(2)


def join_repeated(args: Sequence[str], several: Sequence[str]) -> list[str]:
    """`--adapter a --adapter b` is `--adapter a b`, for the flags that take several values."""
    current: list[str] = []
    groups, first = [current], {}
    for arg in args:
        name, has_value, value = arg.partition("=")
        if not arg.startswith("--"):
            current.append(arg)
        elif name in first:
            current = first[name]
            current += [value] if has_value else []
        else:
            current = [name, value] if has_value and name in several else [arg]
            groups.append(current)
            if name in several:
                first[name] = current
    return [arg for group in groups for arg in group]


def make_parser(script: Path, names: dict[str, Any]) -> ArgumentParser:
    """A parser of the script's settings; its description is the script's docstring."""
    prog = f"python {Path(script).parent.name}/{Path(script).name}"
    settings = read_settings(script, names)
    bare = any(setting.name == "files" for setting in settings)
    parser = Parser(
        prog=prog,
        usage=f"{prog} {'FILE ... ' if bare else ''}[--config FILE] [--NAME VALUE ...]",
        description=names.get("__doc__"),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", action=ActionConfigFile, help="YAML file with any settings below")
    groups = {}
    for setting in settings:
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        several = get_origin(setting.type) is list
        type_ = get_args(setting.type)[0] if several else setting.type
        # `--resume` alone is `--resume true`
        values = {"nargs": "+"} if several else {"nargs": "?", "const": True} if type_ is bool else {}
        if several:
            parser.several += (f"--{setting.name}",)
        if setting.name == "files":
            name, values = "files", {**values, "metavar": "FILE"}
        else:
            name, values = f"--{setting.name}", {**values, "metavar": metavar(type_), "default": setting.default}
        groups[setting.group].add_argument(name, type=type_, help=setting.help, **values)
    return parser


def defaults(script: ModuleType, **changes: Any) -> Namespace:
    """The settings of a script that is called from another one."""
    return Namespace(**{**make_parser(Path(script.__file__), vars(script)).get_defaults().as_dict(), **changes})


def metavar(type_: Any) -> str:
    """What a value of the type looks like: "INT", "true|false", "PATH"."""
    words = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH", bool: "true|false"}
    if type_ in words:
        return words[type_]
    if get_origin(type_) is dict:
        return "JSON"
    if get_origin(type_) is Literal:
        return "{" + ",".join(get_args(type_)) + "}"
    return "|".join(metavar(part) for part in get_args(type_) if part is not type(None))


def run(main: Callable[[Namespace], None], script: str, names: dict[str, Any]) -> None:
    """Parses the command line, calls `main(settings)` and turns a user's mistake into one line and exit code 1."""
    parser = make_parser(Path(script), names)
    settings = parser.parse_args()
    settings.pop("config", None)
    # Fabric's advice is for people who write training loops, not for those who run one
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of parts that are merely faster
    try:
        main(settings)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of a run meet the same mistake
            log(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        log("interrupted")
        sys.exit(130)
    except Exception as error:
        if "Connection closed by peer" in str(error):  # gloo; that process has said why, or was killed
            log("error: Another process of this run ended.")
            sys.exit(1)
        if type(error).__name__ != "OutOfMemoryError":
            raise
        log("error: The GPU's memory is full; lower the batch size or the sequence length, or use fewer bits.")
        sys.exit(1)
