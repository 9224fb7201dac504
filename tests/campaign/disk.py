"""A full disk ends a run with one error line; once there is space, it continues to the files of an undisturbed run.

    python tests/campaign/disk.py --cases 100

The disk is full from a random change of the folder on, or no file can grow beyond a random size, so that a write fails
midway.
"""

import random
from pathlib import Path

from harness import Harness, run_campaign
from kills import STARTS, flags_of, prepare, recover
from runs import KINDS, Runs


def check(harness: Harness, rng: random.Random, folder: Path) -> str:
    runs, start = Runs(harness, rng.choice(list(KINDS))), rng.choice(STARTS)
    prepare(runs, start, folder)
    try:
        if rng.random() < 0.5:
            ended = runs.run(folder, *flags_of(start), watch=folder, kill_at=rng.randint(1, 200), full=True)
            failed = len(ended.calls) > 0 and ended.code != 0
        else:
            limit = int(10 ** rng.uniform(3.2, 4.7))  # stderr is a file too
            ended = runs.run(folder, *flags_of(start), file_limit=limit)
            failed = ended.code != 0
        assert ended.code in (0, 1), f"exit code {ended.code}: {ended.describe()}"
        sentences = (b"no room", b"(File too large)")
        assert not failed or any(s in ended.err for s in sentences), f"another sentence: {ended.describe()}"
        recover(runs, start, folder, rng)
    except AssertionError as error:
        return f"{runs.kind} {start}: {error}"
    return ""


if __name__ == "__main__":
    run_campaign(check, __doc__)
