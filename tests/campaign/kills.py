"""No run is lost to a kill: it continues or starts over, and ends with the files of an undisturbed run.

    python tests/campaign/kills.py --cases 200      kills at random times and at random changes, several in a row
    python tests/campaign/kills.py --every 1        a kill between any two changes of the folder

Both SFT and DPO are killed in a new run, with --resume (of an interrupted or a finished run) and with --overwrite.
"""

import argparse
import itertools
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from harness import Harness
from runs import KINDS, OTHER, Runs, left_temporaries

STARTS = ("first", "resume", "finished", "overwrite")


def prepare(runs: Runs, start: str, folder: Path) -> None:
    """Fill a sandbox with the files that exist before the process that will be killed."""
    source = None
    if start == "resume":
        source = runs.kept("interrupted", lambda folder: interrupt(runs, folder))
    elif start == "finished":
        source = runs.undisturbed()
    elif start == "overwrite":
        source = runs.undisturbed(*OTHER)
    if source is not None:
        shutil.copytree(source, folder, dirs_exist_ok=True)


def interrupt(runs: Runs, folder: Path) -> None:
    """Kill a run after it has written its second state but before it writes the adapter for it."""
    calls = runs.run(runs.kept("counted", lambda folder: None), watch=folder.parent).calls
    states = [i for i, call in enumerate(calls, 1) if call.startswith("replace") and call.endswith("state.pt")]
    runs.run(folder, watch=folder, kill_at=states[1], after=True)


def flags_of(start: str) -> tuple[str, ...]:
    return {"first": (), "overwrite": ("--overwrite",)}.get(start, ("--resume",))


def recover(runs: Runs, start: str, folder: Path, rng: random.Random) -> str:
    """Continue after a kill as a user would, and check the result. Return "old" if the old run survived, else "new"."""
    outcome = "new"
    if start == "overwrite":
        flag = rng.choice(("--overwrite", "--resume", None))
        ended = runs.run(folder, *([flag] if flag else []))
        if ended.code and flag == "--resume":  # the old run is still there
            outcome = "old"
            runs.finish(folder, "--resume", *OTHER)
            runs.check_result(folder, *OTHER)
        elif ended.code:
            runs.finish(folder, "--overwrite")
    else:
        ended = runs.run(folder, *rng.choice(((), ("--resume",))))
        if ended.code:  # refused without a flag, since there is a run
            runs.finish(folder, "--resume")
    if outcome == "new":
        runs.check_result(folder)
    leftovers = left_temporaries(folder)
    assert not leftovers, f"{leftovers[0]} was left"
    return outcome


def check_random(harness: Harness, rng: random.Random, folder: Path) -> str:
    """Kill a run one to three times, each at a random time or at a random change, and recover it."""
    runs, start = Runs(harness, rng.choice(list(KINDS))), rng.choice(STARTS)
    prepare(runs, start, folder)
    flags, killed = flags_of(start), []
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.5:
            ended = runs.run(folder, *flags, kill_after=rng.uniform(0.2, 2.5))
        else:
            ended = runs.run(folder, *flags, watch=folder, kill_at=rng.randint(1, 150), after=rng.random() < 0.5)
        killed.append(ended.killed)
        if start != "overwrite":
            flags = ("--resume",)
    late = "" if any(killed) else " (ended before its kill)"
    return f"{runs.kind} {start} {recover(runs, start, folder, rng)}{late}"


def record_points(harness: Harness, folder: Path) -> list[tuple[str, str, Path]]:
    """Return the state before each change and after the last as (kind, start, copy of the sandbox)."""
    folder.mkdir()
    points = []
    for kind, start in itertools.product(KINDS, STARTS):
        runs, sandbox, copies = Runs(harness, kind), folder / f"{kind}-{start}", folder / f"{kind}-{start}-points"
        sandbox.mkdir()
        prepare(runs, start, sandbox)
        calls = runs.run(sandbox, *flags_of(start), watch=sandbox, record=True).calls
        shutil.move(harness.folder / "record", copies)
        points += [(kind, start, copies / str(n)) for n in range(1, len(calls) + 1)] + [(kind, start, sandbox)]
    return points


def check_point(harness: Harness, rng: random.Random, folder: Path, point: tuple[str, str, Path]) -> str:
    kind, start, copy = point
    shutil.copytree(copy, folder, dirs_exist_ok=True)
    return f"{kind} {start} {recover(Runs(harness, kind), start, folder, rng)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20, help="how many random cases to run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case; case i has seed + i")
    parser.add_argument("--every", type=int, help="instead of random cases: every n-th point, from --seed on")
    args = parser.parse_args()
    failed, outcomes, began = 0, {}, time.perf_counter()
    with Harness() as harness:
        points = record_points(harness, harness.folder / "points") if args.every else []
        chosen = points[args.seed :: args.every] if args.every else [None] * args.cases
        for i, point in enumerate(chosen):
            seed = args.seed + i * (args.every or 1)
            rng, folder = random.Random(seed), Path(tempfile.mkdtemp(prefix="campaign-case-"))
            try:
                outcome = check_point(harness, rng, folder, point) if point else check_random(harness, rng, folder)
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
            except AssertionError as error:
                failed += 1
                print(f"seed {seed}, {point}: {error}\n", flush=True)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    print(f"{len(chosen)} cases, {failed} failed, {time.perf_counter() - began:.0f} s; bit-equal: {outcomes}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
