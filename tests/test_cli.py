import sys
from pathlib import Path
from typing import Literal

import pytest

from lit_llama import cli
from lit_llama.utils import UserError

SCRIPT = '''"""Does something. It is 100% useful."""

from pathlib import Path
from typing import Literal

somewhere: Path | None = None  # a folder, or nowhere
# == Numbers ==
rate: float = 3e-2  # between 0 % and 100 %
count: int = 7  # how many
limit: int | None = None  # at most so many
# a comment that is no group
# == Words ==
kind: Literal["a", "b"] = "a"  # which
devices: int | str = 1  # how many, or "auto"
flag: bool = False  # yes or no
names: list[str] = ["x", "y"]  # several
NOT_A_SETTING = 5


def main(args):
    later: int = 3  # inside a function, so no setting
'''


@pytest.fixture
def script(tmp_path) -> tuple[Path, dict]:
    """A script file and its globals."""
    path = tmp_path / "tools" / "tool.py"
    path.parent.mkdir()
    path.write_text(SCRIPT)
    names: dict = {}
    exec(compile(SCRIPT, str(path), "exec"), names)
    return path, names


def parse(script, arguments: list[str]) -> dict:
    settings = cli.make_parser(*script).parse_args(arguments).as_dict()
    settings.pop("config")
    return settings


def test_settings_are_the_annotated_constants_above_the_first_function(script):
    settings = cli.read_settings(*script)
    assert [(s.name, s.type, s.default, s.help, s.group) for s in settings] == [
        ("somewhere", Path | None, None, "a folder, or nowhere", "Settings"),
        ("rate", float, 0.03, "between 0 % and 100 %", "Numbers"),
        ("count", int, 7, "how many", "Numbers"),
        ("limit", int | None, None, "at most so many", "Numbers"),
        ("kind", Literal["a", "b"], "a", "which", "Words"),
        ("devices", int | str, 1, 'how many, or "auto"', "Words"),
        ("flag", bool, False, "yes or no", "Words"),
        ("names", list[str], ["x", "y"], "several", "Words"),
    ]


def test_values_get_the_type_of_their_setting(script):
    arguments = "--somewhere a/b --rate 1e-3 --limit 4 --devices auto --flag true --names p q".split()
    assert parse(script, arguments) == {
        "somewhere": Path("a/b"), "rate": 1e-3, "count": 7, "limit": 4, "kind": "a", "devices": "auto", "flag": True,
        "names": ["p", "q"],
    }  # fmt: skip
    assert parse(script, ["--devices=2"])["devices"] == 2
    assert parse(script, ["--flag", "--count=3"])["flag"] is True  # alone it is true
    assert parse(script, ["--flag=false"])["flag"] is False


def test_a_constant_changed_in_the_file_is_the_default(script):
    path, names = script
    assert parse((path, {**names, "rate": 0.5}), [])["rate"] == 0.5


def test_yaml_stands_between_the_constants_and_the_flags(script, tmp_path):
    (tmp_path / "some.yaml").write_text("rate: 0.5\ncount: 1\nlimit: null\nsomewhere: here\n")
    settings = parse(script, ["--config", str(tmp_path / "some.yaml"), "--count", "2"])
    assert (settings["rate"], settings["count"], settings["kind"]) == (0.5, 2, "a")
    assert settings["somewhere"] == Path("here")


def test_help_has_every_setting_once_in_its_group_with_default(script):
    text = " ".join(cli.make_parser(*script).format_help().split())
    assert text.startswith(
        "usage: python tools/tool.py [--config FILE] [--NAME VALUE ...] Does something. It is 100% useful."
    )
    for part in (
        "--somewhere PATH a folder, or nowhere Numbers:",
        "Numbers: --rate NUMBER between 0 % and 100 % (default: 0.03)",
        "--count INT how many (default: 7)",
        "--limit INT at most so many Words:",
        "Words: --kind {a,b} which (default: a)",
        "--devices INT|TEXT how many, or auto (default: 1)",
        "--flag [true|false] yes or no (default: false)",
        "--names TEXT [TEXT ...] several (default: [x, y])",
    ):
        assert text.count(part) == 1, part
    assert "<class" not in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rat", "3", "--unknown"], "unrecognized arguments: --rat 3 --unknown"),
        (["--rate", "fast"], "--rate: Expected a float. Got value: fast"),
        (["--kind", "c"], "--kind: Expected one of 'a', 'b'. Got value: c"),
        (["--count", "1.5"], "--count: Expected a int. Got value: 1.5"),
        (["--config", "/nowhere.yaml"], "--config: File does not exist: '/nowhere.yaml'"),
        (["--config", "{yaml}"], "Option 'rat_e' is not accepted"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(script, tmp_path, capsys, arguments, sentence):
    (tmp_path / "wrong.yaml").write_text("rat_e: 1\n")
    with pytest.raises(SystemExit) as stopped:
        parse(script, [a.format(yaml=tmp_path / "wrong.yaml") for a in arguments])
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", f"error: {sentence} (see python tools/tool.py --help)\n")


def run(script, main, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", [str(script[0])])
    with pytest.raises(SystemExit) as stopped:
        cli.run(main, *script)
    return stopped.value.code


def raising(error: BaseException):
    def main(args):
        raise error

    return main


def test_main_gets_the_settings_alone(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(script[0]), "--count", "3"])
    seen = []
    cli.run(seen.append, *script)
    assert seen[0].count == 3
    assert "config" not in seen[0]


def test_a_users_mistake_is_one_line_and_exit_code_1(script, monkeypatch, capsys):
    assert run(script, raising(UserError("There is no x.")), monkeypatch) == 1
    assert capsys.readouterr() == ("", "error: There is no x.\n")


def test_of_several_processes_one_speaks(script, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run(script, raising(UserError("There is no x.")), monkeypatch) == 1
    assert capsys.readouterr().err == ""


def test_ctrl_c_is_no_traceback(script, monkeypatch, capsys):
    assert run(script, raising(KeyboardInterrupt()), monkeypatch) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_full_gpu_is_explained(script, monkeypatch, capsys):
    import torch

    assert run(script, raising(torch.OutOfMemoryError("CUDA out of memory")), monkeypatch) == 1
    assert capsys.readouterr().err.startswith("error: The GPU's memory is full; lower the batch size")


def test_our_own_mistakes_keep_their_traceback(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(script[0])])
    with pytest.raises(ZeroDivisionError):
        cli.run(raising(ZeroDivisionError()), *script)


@pytest.mark.parametrize("path", sorted(p for d in ("finetune", "generate", "scripts", "evaluate", "pretrain")
                                        for p in (Path(__file__).parents[1] / d).glob("*.py")
                                        if "cli.run(" in p.read_text()), ids=lambda p: p.stem)  # fmt: skip
def test_every_setting_of_every_script_is_explained(path):
    import importlib

    module = importlib.import_module(f"{path.parent.name}.{path.stem}")
    settings = cli.read_settings(path, vars(module))
    assert settings
    assert [s.name for s in settings if not s.help] == []
    assert len({s.name for s in settings}) == len(settings)
    bare = ["a file"] if any(s.name == "files" for s in settings) else []
    assert cli.make_parser(path, vars(module)).parse_args(bare)


def test_a_flag_of_several_values_may_be_repeated(script):
    assert parse(script, ["--names", "a", "--kind", "b", "--names", "c", "d", "--names=e"])["names"] == [*"acde"]
    assert parse(script, ["--names=a", "--names", "b"])["names"] == ["a", "b"]
    assert parse(script, ["--kind", "a", "--kind", "b"])["kind"] == "b"
