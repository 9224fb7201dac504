"""Scripts delete or replace only files that they wrote: foreign files in, around and behind every output.

    python tests/campaign/deletion.py --cases 200
    python tests/campaign/deletion.py --cases 100 --only killed

Each case draws a script that writes and a situation: foreign files in the output folder before or after the run, links
planted in it or in its place, an output that is an input, or a kill at a random change. After each run, files that the
script did not write must be unchanged, a refusal must have changed nothing, and after a kill the next run must succeed.
"""

import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness import ROOT, Ended, Harness, changes, run_campaign, snapshot
from material import make_material

sys.path.append(str(ROOT))

from lit_llama.storage.manifest import MANIFEST, find_strangers
from lit_llama.storage.staging import TEMPORARY

CACHE = ".aligner-cache"  # next to prepared datasets


@dataclass(frozen=True)
class Writer:
    """A script that writes.

    Attributes:
        script: Its path.
        flags: Its flags without the output flag; inputs are in the sandbox's folder `in`.
        output: The output flag.
        name: Name of the output; one with a suffix is a file.
        inputs: The files and folders that it reads, in the sandbox.
        claims: The names that it claims in the output, if that is a folder that may contain other files.
    """

    script: str
    flags: str
    output: str = "--output_dir"
    name: str = "out"
    inputs: tuple[str, ...] = ("in/base",)
    claims: tuple[str, ...] = ()

    @property
    def writes_file(self) -> bool:
        return bool(Path(self.name).suffix)


PREPARE = "--checkpoint_dir in/base --num_proc 1 --max_seq_length 64 --test_fraction 0.3"
ANSWER = "--checkpoint_dir in/base --prompt_file in/prompts.json --max_new_tokens 2"
WRITERS = (
    Writer("scripts/prepare_alpaca.py", f"--data_file in/rows.json {PREPARE}", inputs=("in/base", "in/rows.json")),
    Writer("scripts/prepare_beaver_safe.py", f"--data_format preference --data_file in/pairs.jsonl {PREPARE}",
           inputs=("in/base", "in/pairs.jsonl")),
    Writer("scripts/prepare_beaver_safe.py",
           f"--stage sft --data_format preference --data_file in/pairs.jsonl {PREPARE}",
           inputs=("in/base", "in/pairs.jsonl")),
    Writer("scripts/prepare_chat.py", f"--prompt_style alpaca --data_file in/chat.json {PREPARE}",
           inputs=("in/base", "in/chat.json")),
    Writer("scripts/share.py", "--adapter in/adapter.safetensors --repo_id me/pirate --dry_run",
           claims=("adapter.safetensors", "README.md")),
    Writer("scripts/prepare_metamath.py", f"--data_file in/solved.json {PREPARE}",
           inputs=("in/base", "in/solved.json")),
    Writer("scripts/prepare_microworld.py", f"--split train {PREPARE}"),
    Writer("scripts/prepare_microworld_safe.py", f"--pairs 20 {PREPARE}"),
    Writer("scripts/convert_hf_checkpoint.py", "--checkpoint_dir in/hf", inputs=("in/hf",)),
    Writer("scripts/convert_hf_checkpoint.py", "--reverse --checkpoint_dir in/base --max_shard_size 4MB"),
    Writer("scripts/convert_checkpoint.py", "--checkpoint_dir in/meta", inputs=("in/meta",)),
    Writer("scripts/merge_aligner.py", "--checkpoint_dir in/base --adapter in/adapter.safetensors",
           inputs=("in/base", "in/adapter.safetensors")),
    Writer("scripts/merge_aligner.py", "--format lit --checkpoint_dir in/base --adapter in/adapter.safetensors",
           inputs=("in/base", "in/adapter.safetensors")),
    Writer("generate/base.py", ANSWER, "--output_file", "out.json", ("in/base", "in/prompts.json")),
    Writer("generate/aligner.py", f"{ANSWER} --adapter in/adapter.safetensors", "--output_file", "out.json",
           ("in/base", "in/prompts.json", "in/adapter.safetensors")),
    Writer("evaluate/microworld.py", "--checkpoint_dir in/base --questions 2 --groups unseen", "--output_file",
           "out.json"),
    Writer("scripts/inspect_aligner.py", "in/adapter.safetensors", "--to_safetensors", "out.safetensors",
           ("in/adapter.safetensors",)),
    Writer("scripts/inspect_aligner.py", "in/adapter.safetensors", "--plot", "out.png", ("in/adapter.safetensors",)),
    Writer("evaluate/gsm8k.py", "--checkpoint_dir in/base --data_file in/problems.json --max_new_tokens 3",
           claims=("answers.jsonl", "summary.json", "summary.md")),
    Writer("studies/analysis.py", "in/adapter.safetensors", "--out_dir",
           claims=("layers.csv", "gates.png", "prefixes.png")),
)  # fmt: skip

# names of foreign files; many are names that the scripts use
NAMES = ("thesis.tex", "sub/photo.jpg", "meta.json", "lit_config.json", "aligner.json", "config.json",
         "lit_model.safetensors", "model.safetensors", "tokenizer.model", "train/state.json", "rows.json",
         "dataset_dict.json", "best.safetensors", ".hidden", "a b/ü.txt", ".out.tmp/x",
         "train/data-00000-of-00001.arrow", f"{TEMPORARY}notes/x", MANIFEST)  # fmt: skip


def is_temporary(name: str) -> bool:
    """Return whether a relative path belongs to a temporary folder of the script (and not to a planted one)."""
    return any(part.startswith(TEMPORARY) and not part.startswith((f"{TEMPORARY}notes", f"{TEMPORARY}1-"))
               for part in Path(name).parts)  # fmt: skip


class Sandbox:
    """A folder with inputs and foreign files, in which a writer runs and its effects are checked.

    Raises:
        AssertionError: A run crashed or changed files that it must not change.
    """

    def __init__(self, harness: Harness, rng: random.Random, folder: Path) -> None:
        self.harness, self.rng, self.folder = harness, rng, folder
        self.writer = rng.choice(WRITERS)
        self.out = folder / rng.choice(("", "deep/er/")) / self.writer.name
        shutil.copytree(make_material(harness), folder / "in")
        for name in rng.sample(NAMES[:-1], 3):
            self.plant(folder / "around" / name)
            if not folder.joinpath(name).exists():
                self.plant(folder / name)

    def plant(self, path: Path) -> None:
        """Write a foreign file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.rng.choice(("years of work", "{}", "", '{"format": "mine"}', "x" * 2_000)))

    def link(self, path: Path, target: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target if self.rng.random() < 0.5 else os.path.relpath(target, path.parent))

    def run(self, output: object = None, flags: tuple[str, ...] = (), **options: object) -> Ended:
        """Run the writer, and check that nothing but its output has changed."""
        allowed = self.own_paths()
        before = {name: state for name, state in snapshot(self.folder).items() if not is_temporary(name)}
        output = self.out if output is None else output
        words = [*self.writer.flags.split(), self.writer.output, output, *flags]
        ended = self.harness.run(self.writer.script, *words, cwd=self.folder, **options)
        after = snapshot(self.folder)
        assert not ended.problem, f"{ended.problem}: {ended.describe()}"
        lost = changes(before, after)
        new = sorted(name for name in after.keys() - before.keys() if CACHE not in Path(name).parts)
        if ended.code == 0 or ended.killed:
            lost = [text for text in lost if not text.startswith(allowed)]
        assert not lost, f"{lost[0]}: {ended.describe()}"
        if not ended.killed:
            leftovers = [name for name in new if is_temporary(name)]
            assert not leftovers, f"{leftovers[0]} was left: {ended.describe()}"
            assert ended.code == 0 or not new, f"a refusal left {new[0]}: {ended.describe()}"
        return ended

    def own_paths(self) -> tuple[str, ...]:
        """Return the prefixes of descriptions of changes that a successful run may make."""
        out = os.path.relpath(self.out, self.folder)
        if self.writer.claims:
            claimed = (self.out / MANIFEST).is_file()
            return tuple(f"{out}/{name} " for name in (*self.writer.claims, MANIFEST)) if claimed else ()
        if self.writer.writes_file:
            return (f"{out} ",)  # with --overwrite; without it, `refused` checks that it is unchanged
        return (f"{out} ", f"{out}/") if (self.out / MANIFEST).is_file() and not self.strangers() else ()

    def strangers(self) -> list[str]:
        return [] if self.writer.claims else find_strangers(self.out)

    def succeeds(self, *args: object, **options: object) -> None:
        flags = ("--overwrite",) if self.writer.writes_file and self.out.exists() else ()
        ended = self.run(*args, flags=flags, **options)
        assert ended.code == 0, f"was refused: {ended.describe()}"
        assert self.out.exists() and (self.writer.writes_file or not self.strangers()), f"bad: {ended.describe()}"

    def refused(self, *args: object, **options: object) -> None:
        before = snapshot(self.folder)
        ended = self.run(*args, **options)
        assert ended.code == 1, f"was not refused: {ended.describe()}"
        lost = changes(before, snapshot(self.folder))
        assert not lost, f"{lost[0]}: {ended.describe()}"


# == situations ==


def fresh(box: Sandbox) -> None:
    """Write a new output, write it again, and expect a refusal without --overwrite."""
    box.succeeds()
    box.succeeds()
    if box.writer.writes_file:
        box.refused()


def strangers_before(box: Sandbox) -> None:
    """Put foreign files where the output will be."""
    if box.writer.writes_file:
        box.plant(box.out)
        return box.refused()
    names = box.rng.sample((*NAMES, *box.writer.claims), box.rng.randint(1, 6))
    for name in names:
        if not (box.out / name).parent.is_file() and not (box.out / name).is_dir():
            box.plant(box.out / name)
    if box.writer.claims and not {MANIFEST, *box.writer.claims} & set(names):
        return box.succeeds()
    box.refused()


def strangers_after(box: Sandbox) -> None:
    """Add foreign files to the output, or replace its files."""
    box.succeeds()
    if box.writer.writes_file:
        box.plant(box.out)
        return box.refused()
    if box.writer.claims:
        box.plant(box.out / "notes/todo.txt")
        return box.succeeds()
    files = sorted(path for path in box.out.rglob("*") if path.is_file() and path.name != MANIFEST)
    kind = box.rng.choice(("join", "edit", "link", "folder link", "empty folder"))
    if kind == "join":
        box.plant(box.out / box.rng.choice(("notes.txt", "sub/photo.jpg", "train/notes.txt")))
    elif kind == "edit":
        with box.rng.choice(files).open("ab") as file:
            file.write(b" ")
    elif kind == "empty folder":
        (box.out / "empty").mkdir()
    elif kind == "link":
        box.plant(box.folder / "victim")
        (path := box.rng.choice(files)).unlink()
        box.link(path, box.folder / "victim")
    else:
        box.plant(box.folder / "victim/file")
        box.link(box.out / "link", box.folder / "victim")
    box.refused()


def link_in_place(box: Sandbox) -> None:
    """Put a link in place of the output: to a file, to a folder with foreign files, to nothing, or to an old output."""
    kind = box.rng.choice(("file", "folder", "nothing", "own folder"))
    box.plant(box.folder / "victim/file")
    if kind == "own folder" and not box.writer.writes_file and not box.writer.claims:
        box.succeeds()
        box.link(box.folder / "link", box.out)
        return box.succeeds(box.folder / "link")
    target = {"file": "victim/file", "folder": "victim", "nothing": "nothing"}.get(kind, "victim")
    if box.writer.claims:
        box.link(box.out / box.rng.choice(box.writer.claims), box.folder / target)
    else:
        box.link(box.out, box.folder / target)
    box.refused()
    if box.writer.writes_file:
        box.refused(flags=("--overwrite",))


def planted_temporaries(box: Sandbox) -> None:
    """Put links at names that temporary files and folders could have."""
    box.plant(box.folder / "victim/file")
    box.out.parent.mkdir(parents=True, exist_ok=True)
    for pid in range(os.getpid(), os.getpid() + 300):
        box.link(box.out.parent / f".{box.out.name}.{pid}.tmp", box.folder / "victim/file")
    box.link(box.out.parent / f"{TEMPORARY}1-{os.uname().nodename}-{'0' * 16}", box.folder / "victim")
    box.succeeds()


def overlap(box: Sandbox) -> None:
    """Use an input, or a folder that contains one, as the output, with its path written in several ways."""
    if box.writer.claims:
        return  # allowed
    source = box.folder / box.rng.choice(box.writer.inputs)
    if box.writer.writes_file:
        source = source if source.is_file() else next(path for path in source.iterdir() if path.is_file())
    else:
        source = box.rng.choice((source, source.parent, box.folder))
    if box.rng.random() < 0.5:
        box.link(box.folder / "way", source.parent)
        source = box.folder / "way" / source.name
    output = box.rng.choice(
        (source, os.path.relpath(source, box.folder), f"in/../{os.path.relpath(source, box.folder)}")
    )
    box.refused(output)
    if box.writer.writes_file and (source.is_symlink() or source.name in {Path(i).name for i in box.writer.inputs}):
        box.refused(output, flags=("--overwrite",))


def no_place(box: Sandbox) -> None:
    """Use an output path that is taken, is below something that is not a folder, or has a name that is too long."""
    (box.folder / "file").write_text("a file")
    places = ["file/x", "file/x/y", "n" * 300, f"{'n' * 300}/x", "/dev/full", "/dev/null/x", "/proc/x", "."]
    places += ["/dev/null", "in", ".."] if box.writer.writes_file else ["file", "in"]
    box.refused(box.rng.choice(places), flags=("--overwrite",) if box.writer.writes_file else ())


def long_name(box: Sandbox) -> None:
    """Use an output name as long as the file system allows."""
    box.out = box.out.with_name("n" * (250 - len(box.out.suffix)) + box.out.suffix)
    box.succeeds()


def killed(box: Sandbox) -> None:
    """Kill the script at a random change, in the first write or in a replacement; then run it again."""
    replacing = box.rng.random() < 0.7
    if replacing:
        box.succeeds()
    flags = ("--overwrite",) if box.writer.writes_file else ()
    calls = box.run(flags=flags, watch=box.folder).calls
    kill_at, after = box.rng.randint(1, len(calls)), box.rng.random() < 0.5
    if not replacing:
        shutil.rmtree(box.out) if box.out.is_dir() else box.out.unlink()  # the first run only counted the changes
    shutil.rmtree(box.out.parent / CACHE, ignore_errors=True)
    ended = box.run(flags=flags, watch=box.folder, kill_at=kill_at, after=after)
    assert ended.killed, f"ended before its kill at change {kill_at} of {len(calls)}: {ended.describe()}"
    box.succeeds()
    # the cache is cleaned up by the next write to it, and there may be none
    leftovers = [name for name in snapshot(box.folder) if is_temporary(name) and CACHE not in Path(name).parts]
    assert not leftovers, f"{leftovers[0]} was left after a kill at {calls[kill_at - 1]}"


SITUATIONS: dict[str, Callable[[Sandbox], None]] = {
    situation.__name__: situation
    for situation in (fresh, strangers_before, strangers_after, link_in_place, planted_temporaries, overlap, no_place,
                      long_name, killed)
}  # fmt: skip


def check(harness: Harness, rng: random.Random, folder: Path, only: list[str] | None = None) -> str:
    situation = SITUATIONS[rng.choice(only or list(SITUATIONS))]
    box = Sandbox(harness, rng, folder)
    try:
        situation(box)
    except AssertionError as error:
        return f"{situation.__name__}: {error}"
    return ""


if __name__ == "__main__":
    run_campaign(check, __doc__, kinds=tuple(SITUATIONS))
