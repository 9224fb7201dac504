"""The `aligner` command: short names for the most common scripts, in an editable installation (`pip install -e .`).

aligner finetune --help     is     python finetune/aligner.py --help

Relative paths, including the defaults, refer to the current folder, so run it in the clone.
"""

import ast
import os
import sys
from difflib import get_close_matches
from pathlib import Path

ROOT = Path(__file__).parent.parent.resolve()
COMMANDS = {
    "demo": "scripts/demo.py",
    "finetune": "finetune/aligner.py",
    "dpo": "finetune/alignerDPO.py",
    "rl": "finetune/alignerRL.py",
    "generate": "generate/aligner.py",
    "serve": "generate/serve.py",
    "download": "scripts/download.py",
    "convert": "scripts/convert_hf_checkpoint.py",
    "inspect": "scripts/inspect_aligner.py",
    "merge": "scripts/merge_aligner.py",
    "share": "scripts/share.py",
}
READ_BASE = ("finetune", "dpo", "rl", "generate", "serve", "merge")  # commands whose default base is in checkpoints/


def main() -> None:
    """Replace this process with the script of a command."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return
    if not ROOT.joinpath("finetune").is_dir():
        sys.exit("error: The aligner command needs the repository; run pip install -e . in a clone.")
    if name not in available():
        near = get_close_matches(name, available(), 1)
        hint = f"; did you mean {near[0]}?" if near else f"; choose one of {', '.join(available())}."
        sys.exit(f"error: There is no command {name}{hint}")
    given = {argument.partition("=")[0] for argument in arguments}
    has_base = given & {"--checkpoint_dir", "--config", "--help", "-h"} or Path("checkpoints").is_dir()
    if name in READ_BASE and not has_base:
        sys.exit(
            f"error: There is no folder checkpoints here; run aligner {name} in {ROOT}, or pass --checkpoint_dir and "
            "the other paths."
        )
    os.execv(sys.executable, [sys.executable, str(ROOT / COMMANDS[name]), *arguments])


def available() -> dict[str, Path]:
    """Return the commands whose script exists, and its path."""
    return {name: ROOT / script for name, script in COMMANDS.items() if (ROOT / script).is_file()}


def overview() -> str:
    """Return the list of commands with the first sentence of each script."""
    lines = [f"    {name:<10}{first_sentence(path)}" for name, path in available().items()]
    return "\n".join(["Usage: aligner COMMAND [--help] [--NAME VALUE ...]", "", *lines])


def first_sentence(script: Path) -> str:
    """Return the first sentence of a script's docstring."""
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


if __name__ == "__main__":
    main()
