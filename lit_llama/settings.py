"""Settings of a script: a dataclass whose fields are explained by the comment on their line.

@dataclass
class Settings:
    # == Optimisation ==
    learning_rate: float = 9e-3  # peak learning rate, above 0
"""

import inspect
import io
import tokenize
from dataclasses import MISSING, dataclass, fields
from textwrap import dedent
from typing import Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Setting:
    """One field of a settings class.

    Args:
        name, type, default: of the field; `type` is that of one value where there are several, `default` is `MISSING`
            where the field has none.
        comment: the comment on the line of the field.
        group: the text of the last comment `# == Group ==` before it.
        several: the field is a tuple.
    """

    name: str
    type: Any
    default: Any
    comment: str
    group: str
    several: bool


def describe(settings_class: type) -> list[Setting]:
    """Return the settings of a dataclass, group by group; the class's fields come before those of its bases."""
    types, by_name = get_type_hints(settings_class), {field.name: field for field in fields(settings_class)}
    settings = []
    for name, (comment, group) in field_comments(settings_class).items():
        several = get_origin(types[name]) is tuple
        type_ = get_args(types[name])[0] if several else types[name]
        field = by_name[name]
        default = field.default if field.default_factory is MISSING else field.default_factory()
        settings.append(Setting(name, type_, default, comment, group, several))
    if missing := sorted(by_name.keys() - {setting.name for setting in settings}):
        raise TypeError(f"{settings_class.__name__}.{missing[0]} has no comment that explains it.")
    return settings


def field_comments(settings_class: type) -> dict[str, tuple[str, str]]:
    """Return the comment and the group of each field. A field that a class defines again stands with that class."""
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
