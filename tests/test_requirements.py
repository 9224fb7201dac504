"""Imports match the requirements, and each requirement has one pinned version for every supported Python."""

import ast
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
ROOMS = ("lit_llama", "finetune", "generate", "microworld", "pretrain", "evaluate", "scripts", "studies", "benchmarks")
DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml", "google": "protobuf"}  # where the module has another name
OPTIONAL = {
    "transformers",
    "bitsandbytes",
    "httpx",
}  # needed by some flags, benchmarks and tests
SERVER = {"generate/app.py", "generate/guard.py", "generate/openai_format.py"}  # imported when the server starts
PEERS = {"peft", "litgpt", "lm-eval", "wandb"}  # used if installed
USED_BY_LIBRARIES = {"protobuf": "sentencepiece's model files"}
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def imported(source: str, nested: bool) -> set[str]:
    """Return the distributions that a file imports at its top level, or also inside functions."""
    tree, names = ast.parse(source), set()
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in names - set(sys.stdlib_module_names)}


def imports_of(*folders: str, nested: bool = True) -> set[str]:
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    paths = [path for path in paths if path.relative_to(ROOT).as_posix() not in SERVER]
    return imports_in(paths, nested)


def imports_in(paths: list[Path], nested: bool = True) -> set[str]:
    distributions = set().union(*(imported(path.read_text(encoding="utf-8"), nested) for path in paths))
    return distributions - {
        canonicalize_name(name) for name in (*ROOMS, "tests", *(p.stem for p in (ROOT / "tests").rglob("*.py")))
    }


def read(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


REQUIRED, SERVING, DEVELOPMENT, PINS = map(
    read, ("requirements.txt", "requirements-serve.txt", "requirements-dev.txt", "constraints.txt")
)


def test_imports_are_found():
    source = "import os\nimport yaml\nfrom a.b import c\ndef f():\n    import sklearn.tree, huggingface_hub\n"
    assert imported(source, nested=False) == {"pyyaml", "a"}
    assert imported(source, nested=True) == {"pyyaml", "a", "scikit-learn", "huggingface-hub"}


def test_imports_of_the_source_are_required():
    assert imports_of(*ROOMS, nested=False) <= names(REQUIRED)
    assert imports_of(*ROOMS) <= names(REQUIRED) | OPTIONAL | PEERS | names(SERVING)


def test_imports_of_the_server_are_required():
    server = imports_in([ROOT / path for path in SERVER]) | imports_in([ROOT / "generate" / "serve.py"])
    assert names(SERVING) <= server <= names(REQUIRED) | names(SERVING)
    assert "-r requirements-serve.txt" in (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()


def test_imports_of_the_tests_are_required():
    assert imports_of("tests") <= names(REQUIRED + SERVING + DEVELOPMENT) | {"packaging"}  # pytest requires packaging
    assert OPTIONAL <= names(DEVELOPMENT)


def test_every_requirement_is_imported():
    assert names(REQUIRED) - imports_of(*ROOMS) == set(USED_BY_LIBRARIES)


@pytest.mark.parametrize("python", PYTHONS)
def test_each_requirement_has_one_pinned_version(python):
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    pins = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate(environment)]
    versions = {canonicalize_name(pin.name): re.fullmatch(r"==([\w.]+)", str(pin.specifier))[1] for pin in pins}
    assert len(versions) == len(pins)
    for requirement in REQUIRED + SERVING + DEVELOPMENT:
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement
