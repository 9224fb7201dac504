import functools
import importlib
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import pytest

from lit_llama import cli
from lit_llama.console import did_you_mean
from lit_llama.settings import (
    Checked,
    NonNegativeFloat,
    Number,
    OpenShare,
    PositiveInt,
    PositiveShare,
    Seed,
    Setting,
    describe,
    ranges,
)
from lit_llama.utils import UserError

SCRIPT = '''"""Does something. It is 100% useful.

    a table   keeps
    its       lines
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass
class Shared:
    # == Words ==
    kind: Literal["a", "b"] = "a"  # which
    devices: int | str = 1  # how many, or "auto"
    flag: bool = False  # yes or no
    names: tuple[str, ...] = ("x", "y")  # several


@dataclass
class Settings(Shared):
    somewhere: Path | None = None  # a folder, or nowhere
    # == Numbers ==
    rate: float = 3e-2  # between 0 % and 100 %
    count: int = 7  # how many
    limit: int | None = None  # at most so many
    # a comment that is no group
    flag: bool = False  # yes or no, here with "#" in it
'''


@pytest.fixture
def settings_class(tmp_path, monkeypatch) -> type:
    """The settings class of a script."""
    path = tmp_path / "tools" / "tool.py"
    path.parent.mkdir()
    path.write_text(SCRIPT)
    monkeypatch.syspath_prepend(path.parent)
    sys.modules.pop("tool", None)
    return importlib.import_module("tool").Settings


def parse(settings_class: type, arguments: list[str]) -> dict:
    return vars(cli.parse(settings_class, arguments))


def test_settings_are_described_by_their_comments(settings_class):
    assert describe(settings_class) == [
        Setting("somewhere", Path | None, None, "a folder, or nowhere", "Settings", False),
        Setting("rate", float, 0.03, "between 0 % and 100 %", "Numbers", False),
        Setting("count", int, 7, "how many", "Numbers", False),
        Setting("limit", int | None, None, "at most so many", "Numbers", False),
        Setting("flag", bool, False, 'yes or no, here with "#" in it', "Numbers", False),
        Setting("kind", Literal["a", "b"], "a", "which", "Words", False),
        Setting("devices", int | str, 1, 'how many, or "auto"', "Words", False),
        Setting("names", str, ("x", "y"), "several", "Words", True),
    ]


def test_a_setting_without_a_comment_is_an_error():
    @dataclass
    class Bare:
        rate: float = 1.0

    with pytest.raises(TypeError, match=r"Bare\.rate has no comment"):
        describe(Bare)


@dataclass
class Numbers(Checked):
    count: PositiveInt = 1
    limit: PositiveInt | None = None
    counts: tuple[PositiveInt, ...] = ()
    devices: PositiveInt | str = 1
    seed: Seed = 0
    strength: Number = -1.0
    decay: NonNegativeFloat = 0.0
    top_p: PositiveShare = 1.0
    valid: OpenShare = 0.5


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"count": None}, "count is null; leave it out for its default."),
        ({"counts": None}, "counts is null; leave it out for its default."),
        ({"count": 0}, "count is 0; it must be 1 or more."),
        ({"count": 2**31}, "count is 2147483648; it must be at most 2147483647."),
        ({"count": 10**400}, f"count is {10**400}; it must be at most 2147483647."),
        ({"limit": -1}, "limit is -1; it must be 1 or more."),
        ({"counts": (1, 0)}, "counts is 0; it must be 1 or more."),
        ({"devices": 0}, "devices is 0; it must be 1 or more."),
        ({"seed": 2**32}, "seed is 4294967296; it must be at most 4294967295."),
        ({"strength": math.nan}, "strength is nan; it must be a number."),
        ({"strength": -math.inf}, "strength is -inf; it must be above -inf."),
        ({"decay": -0.1}, "decay is -0.1; it must be 0 or more."),
        ({"decay": math.inf}, "decay is inf; it must be below inf."),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0."),
        ({"top_p": 1.5}, "top_p is 1.5; it must be at most 1."),
        ({"valid": 1.0}, "valid is 1.0; it must be below 1."),
        ({"count": 0, "seed": -1}, "count is 0; it must be 1 or more. seed is -1; it must be 0 or more."),
    ],
)
def test_a_number_out_of_range_is_refused(values, sentence):
    with pytest.raises(UserError) as error:
        Numbers(**values)
    assert str(error.value) == sentence


def test_a_changed_default_keeps_the_range():
    @dataclass
    class Others(Numbers):
        decay: float = 1.0

    with pytest.raises(UserError, match=r"decay is -0\.1; it must be 0 or more"):
        Others(decay=-0.1)


def test_numbers_at_their_bounds_are_allowed():
    Numbers(count=2**31 - 1, limit=1, counts=(1, 2), devices="auto", seed=2**32 - 1, strength=-1e300, top_p=1e-9)


def test_values_get_the_type_of_their_setting(settings_class):
    arguments = "--somewhere a/b --rate 1e-3 --limit 4 --devices auto --flag true --names p q".split()
    assert parse(settings_class, arguments) == {
        "somewhere": Path("a/b"), "rate": 1e-3, "count": 7, "limit": 4, "kind": "a", "devices": "auto", "flag": True,
        "names": ("p", "q"),
    }  # fmt: skip
    assert parse(settings_class, ["--devices=2"])["devices"] == 2
    assert parse(settings_class, ["--flag", "--count=3"])["flag"] is True  # a flag without a value is true
    assert parse(settings_class, ["--flag=false"])["flag"] is False


def test_a_path_may_begin_with_the_home_folder(settings_class, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("somewhere: ~/runs/x\nnames: [~/y]")
    given = parse(settings_class, ["--config", str(tmp_path / "c.yaml")])
    assert (given["somewhere"], given["names"]) == (tmp_path / "runs/x", ("~/y",))
    assert parse(settings_class, ["--somewhere=~/z"])["somewhere"] == tmp_path / "z"
    assert parse(settings_class, ["--somewhere=a~b/~"])["somewhere"] == Path("a~b/~")


def test_editing_a_default_in_the_script_changes_the_default(settings_class):
    path = Path(sys.modules["tool"].__file__)
    path.write_text(SCRIPT.replace("3e-2", "0.5"))
    del sys.modules["tool"]
    importlib.invalidate_caches()
    path.with_suffix(".pyc").unlink(missing_ok=True)
    assert parse(importlib.import_module("tool").Settings, [])["rate"] == 0.5


def test_yaml_overrides_defaults_and_flags_override_yaml(settings_class, tmp_path):
    (tmp_path / "some.yaml").write_text("rate: 0.5\ncount: 1\nlimit: null\nsomewhere: here\nnames: [p]\n")
    settings = parse(settings_class, ["--config", str(tmp_path / "some.yaml"), "--count", "2"])
    assert (settings["rate"], settings["count"], settings["kind"]) == (0.5, 2, "a")
    assert settings["somewhere"] == Path("here")
    assert settings["names"] == ("p",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds null; expected lines such as seed: 1"),
        (b"- a", "holds a list; expected lines"),
        (b"count: \xff", "is not YAML: 'utf-8' codec can't decode byte 0xff"),
        (b"count: &a {b: *a}", "is not YAML: it holds an alias"),
        (b"[" * 20_000, "is nested more than 64 levels deep"),
        (b"count: " + b"9" * 5001, "is not YAML: Exceeds the limit (4300 digits)"),
        (b"[1, 2", "is not YAML: while parsing a flow sequence"),
        (b"!!python/object/apply:os.system [ls]", "is not YAML: could not determine a constructor"),
        (b"flag: !!bool x", "is not YAML: a value does not fit the tag"),
        (b'count: !!int ""', "is not YAML: a value does not fit the tag"),
        (b"kind: !!timestamp x", "is not YAML: a value does not fit the tag"),
        (b"names: {a: b}", "names is an object; it must be a list such as [a, b]."),
        (b"names: a", 'names is "a"; it must be a list such as [a, b].'),
        (b'somewhere: "a\\0b"', "somewhere contains a null character."),
        (b"config: other.yaml", "There is no setting 'config'"),
    ],
)
def test_a_bad_yaml_file_is_one_line(settings_class, tmp_path, capsys, content, reason):
    (tmp_path / "bad.yaml").write_bytes(content)
    for arguments in (["--config", str(tmp_path / "bad.yaml")], [f"--config={tmp_path / 'bad.yaml'}"]):
        with pytest.raises(SystemExit) as stopped:
            parse(settings_class, arguments)
        assert stopped.value.code == 2
        assert reason in capsys.readouterr().err


def test_print_config_writes_yaml_that_config_reads(settings_class, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(settings_class, ["--count", "3", "--names", "p", "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert parse(settings_class, ["--config", str(tmp_path / "printed.yaml")]) == parse(
        settings_class, ["--count", "3", "--names", "p"]
    )


def test_help_lists_every_setting_once_in_its_group_with_its_default(settings_class):
    text = cli.make_parser(settings_class).format_help()
    assert "\n    a table   keeps\n    its       lines\n" in text
    text = " ".join(text.split())
    assert text.startswith(
        "usage: python tools/tool.py [--config FILE] [--NAME VALUE ...] Does something. It is 100% useful."
    )
    for part in (
        "--somewhere PATH a folder, or nowhere Numbers:",
        "Numbers: --rate NUMBER between 0 % and 100 % (default: 0.03)",
        "--count INT how many (default: 7)",
        "--limit INT at most so many",
        "--kind {a,b} which (default: a)",
        '--devices INT|TEXT how many, or "auto" (default: 1)',
        "(default: false) Words:",
        "--names TEXT [TEXT ...] several (default: [x, y])",
    ):
        assert text.count(part) == 1, part
    assert "<class" not in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rat", "3", "--unknown"], "There is no flag --rat; did you mean --rate?"),
        (["--unknown"], "There is no flag --unknown."),
        (["--rate", "fast"], "--rate: expected NUMBER, got 'fast'"),
        (["--kind", "c"], "--kind: expected {a,b}, got 'c'"),
        (["--count", "1.5"], "--count: expected INT, got '1.5'"),
        (["--limit", "1.5"], "--limit: expected INT, got '1.5'"),
        (["--rate", "9" * 400], "int too large to convert to float"),
        (["--config", "/nowhere.yaml"], "There is no settings file at /nowhere.yaml."),
        (["--config", "{yaml}x"], "There is no settings file at {yaml}x; did you mean wrong.yaml?"),
        (["--config", "{yaml}"], "There is no setting 'rat_e'; did you mean rate?"),
    ],
)
def test_an_invalid_command_line_gives_one_line_and_exit_code_2(settings_class, tmp_path, capsys, arguments, sentence):
    (tmp_path / "wrong.yaml").write_text("rat_e: 1\n")
    with pytest.raises(SystemExit) as stopped:
        parse(settings_class, [a.replace("{yaml}", str(tmp_path / "wrong.yaml")) for a in arguments])
    sentence = sentence.replace("{yaml}", str(tmp_path / "wrong.yaml"))
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", f"error: {sentence} (see python tools/tool.py --help)\n")


def run(settings_class, main, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["tool.py"])
    with pytest.raises(SystemExit) as stopped:
        cli.run(main, cli.parse(settings_class))
    return stopped.value.code


def raising(error: BaseException):
    def main(args):
        raise error

    return main


def test_main_receives_only_the_settings(settings_class, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tool.py", "--count", "3"])
    received = []
    cli.run(received.append, cli.parse(settings_class))
    assert received[0].count == 3
    assert isinstance(received[0], settings_class)


def test_a_user_error_gives_one_line_and_exit_code_1(settings_class, monkeypatch, capsys):
    assert run(settings_class, raising(UserError("There is no x.")), monkeypatch) == 1
    assert capsys.readouterr() == ("", "error: There is no x.\n")


def test_only_one_of_several_processes_prints_the_error(settings_class, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(settings_class, raising(UserError("There is no x.")), monkeypatch) == 1
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("WORLD_SIZE")  # a rank left over from another program
    assert run(settings_class, raising(UserError("There is no x.")), monkeypatch) == 1
    assert capsys.readouterr().err == "error: There is no x.\n"


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_a_rank_that_is_not_a_number_gives_a_one_line_error(settings_class, monkeypatch, capsys, name):
    monkeypatch.setenv(name, "abc")
    assert run(settings_class, print, monkeypatch) == 1
    assert capsys.readouterr() == ("", f"error: The environment variable {name} is 'abc', not a number; unset it.\n")


def test_ctrl_c_prints_no_traceback(settings_class, monkeypatch, capsys):
    assert run(settings_class, raising(KeyboardInterrupt()), monkeypatch) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_during_the_imports_is_no_traceback(tmp_path):
    (tmp_path / "script.py").write_text(
        "from lit_llama import cli\nimport os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # a background job of a shell ignores SIGINT, and these tests may run in one
    reset = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, tmp_path / "script.py"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, preexec_fn=reset)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


def test_running_out_of_gpu_memory_is_explained(settings_class, monkeypatch, capsys):
    import torch

    assert run(settings_class, raising(torch.OutOfMemoryError("CUDA out of memory")), monkeypatch) == 1
    assert capsys.readouterr().err.startswith("error: The GPU's memory is full; lower the batch size")


def test_unexpected_errors_keep_their_traceback(settings_class, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tool.py"])
    with pytest.raises(ZeroDivisionError):
        cli.run(raising(ZeroDivisionError()), cli.parse(settings_class))


ROOT = Path(__file__).parents[1]
SCRIPTS = [path for path in sorted(ROOT.glob("*/*.py")) if "\n    cli.run(main, " in path.read_text()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_setting_of_every_script_is_explained(path):
    module = importlib.import_module(f"{path.parent.name}.{path.stem}")
    settings = describe(module.Settings)
    assert settings
    assert len({s.name for s in settings}) == len(settings)
    groups = {s.group for s in settings}
    assert len({group.partition(" (")[0] for group in groups}) == len(groups)  # none occurs with two explanations
    numbers = {s.name for s in settings if {int, float} & {s.type, *get_args(s.type)}}
    assert numbers == ranges(module.Settings).keys()  # every number has a range
    assert issubclass(module.Settings, Checked)  # which checks the ranges, and that nothing required is null
    files = ["a file"] if any(s.name == "files" for s in settings) else []
    assert cli.parse(module.Settings, files)


def test_a_flag_of_several_values_may_be_repeated(settings_class):
    arguments = ["--names", "a", "--kind", "b", "--names", "c", "d", "--names=e"]
    assert parse(settings_class, arguments)["names"] == (*"acde",)
    assert parse(settings_class, ["--names=a", "--names", "b"])["names"] == ("a", "b")
    assert parse(settings_class, ["--kind", "a", "--kind", "b"])["kind"] == "b"


def test_a_value_may_begin_with_a_dash(settings_class):
    assert parse(settings_class, ["--names=-x", "--kind", "b"])["names"] == ("-x",)
    assert parse(settings_class, ["--names=--help"])["names"] == ("--help",)


def test_the_dashes_of_flags_do_not_make_them_similar():
    assert did_you_mean("--lr", ["--logger", "--learning_rate"]) == "."
    assert did_you_mean("--loger", ["--logger", "--learning_rate"]) == "; did you mean --logger?"
