"""Settings of a script: a dataclass in which the comment on the line of each field explains it.

@dataclass
class Settings(Checked):
    # == Optimization ==
    learning_rate: PositiveFloat = 9e-3  # peak learning rate

The type of a number defines its range, which is checked when the settings are constructed.
"""

import inspect
import io
import json
import math
import os
import tokenize
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from lit_llama.console import did_you_mean
from lit_llama.storage.schema import read_yaml, shown
from lit_llama.utils import UserError


@dataclass(frozen=True)
class Range:
    """The range of a number, which must be finite and within all bounds.

    Args:
        least, most: inclusive bounds.
        above, below: exclusive bounds.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def expected(self, number: float) -> str:
        """Return what a number out of range must be, such as "1 or more"; empty for a number in range."""
        if number != number:
            return "a number"
        if number < self.least or number <= self.above:
            return f"above {self.above}" if self.above >= self.least else f"{self.least} or more"
        if number > self.most or number >= self.below:
            return f"below {self.below}" if self.below <= self.most else f"at most {self.most}"
        return ""


METAVARS = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH", bool: "true|false"}
MAX_INT = 2**31 - 1
PositiveInt = Annotated[int, Range(least=1, most=MAX_INT)]
NonNegativeInt = Annotated[int, Range(least=0, most=MAX_INT)]
Seed = Annotated[int, Range(least=0, most=2**32 - 1)]  # the seeds that NumPy accepts
Number = Annotated[float, Range()]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(least=0, most=1)]
PositiveShare = Annotated[float, Range(above=0, most=1)]
OpenShare = Annotated[float, Range(above=0, below=1)]

Quantize = Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"]  # dq: the scales are quantized too

# set by launchers (torchrun, srun, jsrun, Lightning) to number the processes of a run; libraries read them on import
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT",
         "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "JSM_NAMESPACE_RANK")  # fmt: skip


def check_environment() -> None:
    """Check the environment variables that number the processes of a run.

    Raises:
        UserError: One is not a number.
    """
    for name in RANKS:
        if not os.environ.get(name, "0").isdecimal():
            raise UserError(f"The environment variable {name} is {os.environ[name]!r}, not a number; unset it.")


class Checked:
    """Base of settings whose numbers are checked. `may_be_empty` names the lists that may be empty.

    Raises:
        UserError: A number is out of range, or a required setting is null or an empty list.
    """

    may_be_empty = ()

    def __post_init__(self) -> None:
        none = [f for f in fields(self) if getattr(self, f.name) is None and type(None) not in get_args(f.type)]
        problems = [f"{f.name} is null; leave it out for its default" for f in none if f.default is not None]
        empty = [f.name for f in fields(self) if getattr(self, f.name) == () and f.default not in ((), MISSING)]
        problems += [f"{name} is empty; give at least one" for name in empty if name not in self.may_be_empty]
        for name, allowed in ranges(type(self)).items():
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and (expected := allowed.expected(number)):
                    problems.append(f"{name} is {number}; it must be {expected}")
        if problems:
            raise UserError(". ".join(problems) + ".")


@cache
def ranges(settings_class: type) -> dict[str, Range]:
    """Return the range of each setting whose type defines one, including inherited settings."""
    by_name = {}
    for cls in reversed(inspect.getmro(settings_class)):
        hints = get_type_hints(cls, include_extras=True)
        by_name |= {name: allowed for name, hint in hints.items() if (allowed := range_of(hint))}
    return by_name


def range_of(hint: Any) -> Range | None:
    """Return the range in a type such as `PositiveInt | None`."""
    return hint if isinstance(hint, Range) else next(filter(None, map(range_of, get_args(hint))), None)


@dataclass(frozen=True)
class Setting:
    """One field of a settings class.

    Args:
        name, type, default: those of the field. For a tuple, `type` is that of one value; `default` is `MISSING` if the
            field has none.
        comment: the comment on the line of the field.
        group: the text of the last comment `# == Group ==` before it.
        several: whether the field is a tuple.
        may_be_empty: whether the list may be empty.
    """

    name: str
    type: Any
    default: Any
    comment: str
    group: str
    several: bool
    may_be_empty: bool = False


def describe(settings_class: type) -> list[Setting]:
    """Return the settings of a dataclass, group by group; the class's fields come before those of its bases."""
    types, by_name = get_type_hints(settings_class), {field.name: field for field in fields(settings_class)}
    settings, may_be_empty = [], getattr(settings_class, "may_be_empty", ())
    for name, (comment, group) in field_comments(settings_class).items():
        several = get_origin(types[name]) is tuple
        type_ = get_args(types[name])[0] if several else types[name]
        field = by_name[name]
        default = field.default if field.default_factory is MISSING else field.default_factory()
        settings.append(Setting(name, type_, default, comment, group, several, name in may_be_empty))
    if missing := sorted(by_name.keys() - {setting.name for setting in settings}):
        raise TypeError(f"{settings_class.__name__}.{missing[0]} has no comment that explains it.")
    return settings


def from_parsed(value: Any) -> Any:
    """Return a parsed value as that of a setting: lists as tuples, and paths with `~` replaced by the home folder."""
    if isinstance(value, list):
        return tuple(map(from_parsed, value))
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Return settings as words of a command line, such as `--seeds 1 2`, without those that are None."""
    words = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name}", *map(as_word, value if isinstance(value, list | tuple) else [value])]
    return words


def as_word(value: Any) -> str:
    """Return one value of a flag: true or false for a bool, JSON for a dict."""
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def metavar(type_: Any) -> str:
    """Return a placeholder for a value of the type, such as "INT" or "true|false"."""
    if get_origin(type_) is Literal:
        return "{" + ",".join(map(str, get_args(type_))) + "}"
    if get_origin(type_) not in (None, dict):
        return "|".join(metavar(part) for part in get_args(type_) if part is not type(None))
    return METAVARS.get(type_, "JSON")


def field_comments(settings_class: type) -> dict[str, tuple[str, str]]:
    """Return the comment and the group of each field. A field that a class overrides is listed with that class."""
    comments: dict[str, tuple[str, str]] = {}
    for cls in inspect.getmro(settings_class)[:-1]:
        group, name = "Settings", None
        for token in tokenize.generate_tokens(io.StringIO(dedent(inspect.getsource(cls))).readline):
            text = token.string.lstrip("# ")
            if token.type == tokenize.NEWLINE:
                name = None
            elif token.type == tokenize.NAME and name is None:
                name = token.string
            elif token.type == tokenize.COMMENT and token.string.startswith("# == "):
                group = token.string.strip("#= ")
            elif token.type == tokenize.COMMENT and name in cls.__annotations__:
                comments.setdefault(name, (text, group))
    return comments


def check_config(path: Path, settings: dict[str, Setting]) -> None:
    """Check a YAML file of settings before jsonargparse reads it and checks the types of its values.

    Raises:
        UserError: The file does not exist, is not a mapping, has an unknown setting, or a value that must be a list is
            not one.
    """
    if not os.path.lexists(path) and path.parent.is_dir():
        near = did_you_mean(path.name, [other.name for other in path.parent.glob("*.y*ml")])
        raise UserError(f"There is no settings file at {path}{near}")
    for name, value in read_yaml(path).items():
        if name not in settings:
            raise UserError(f"There is no setting {name!r}{did_you_mean(str(name), settings)}")
        if settings[name].several and not isinstance(value, list | None):
            raise UserError(f"{path}: {name} is {shown(value)}; it must be a list such as [a, b].")
        if any(isinstance(v, str) and "\0" in v for v in (value if isinstance(value, list) else [value])):
            raise UserError(f"{path}: {name} contains a null character.")
