"""Command lines made from the commented constants at the top of a script.

A script says each setting once:

    learning_rate: float = 9e-3  # peak learning rate, above 0

and gets `--learning_rate`, its type check, its default and its line in `--help` from that, and the same key in a
YAML file given with `--config`. A comment line `# == Optimiser ==` starts a group.
"""

import ast
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

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
    """The annotated constants above the first function of a script.

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
            for line in lines[node.end_lineno :]:
                if not line.startswith("    #"):
                    break
                comment += " " + line.strip().lstrip("# ")
            settings.append(Setting(name, eval(ast.unparse(node.annotation), names), names[name], comment, group))
    return settings


def make_parser(script: Path, names: dict[str, Any]) -> ArgumentParser:
    """A parser of the script's settings; its description is the script's docstring."""
    parser = ArgumentParser(
        prog=f"python {Path(script).parent.name}/{Path(script).name}", description=names.get("__doc__")
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the settings below")
    groups = {}
    for setting in read_settings(script, names):
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        several = get_origin(setting.type) is list
        groups[setting.group].add_argument(
            f"--{setting.name}",
            type=get_args(setting.type)[0] if several else setting.type,
            nargs="+" if several else None,
            default=setting.default,
            help=setting.help.replace("%", "%%"),
        )
    return parser


def run(main: Callable[[Namespace], None], script: str, names: dict[str, Any]) -> None:
    """Parses the command line, calls `main(settings)` and turns a user's mistake into one line and exit code 1."""
    parser = make_parser(Path(script), names)
    settings = parser.parse_args()
    settings.pop("config", None)
    # Fabric's advice is for people who write training loops, not for those who run one
    warnings.filterwarnings("ignore", module="lightning")
    try:
        main(settings)
    except UserError as error:
        log(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        log("interrupted")
        sys.exit(130)
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        log("error: The GPU's memory is full; lower the batch size or the sequence length, or use fewer bits.")
        sys.exit(1)
