"""What a user sees of a mistake: one clear sentence, a hint at the near name, and an exit code."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from lit_llama.utils import UserError, log


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: a near name, if there is one, and a full stop."""
    near = get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else "."


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError`, Ctrl-C or a full GPU into one line on stderr and a non-zero exit code.

    Other exceptions are mistakes of this project and keep their traceback.
    """
    # Fabric's advice is for people who write training loops, not for those who run one
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about optional parts that are only faster
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of a run meet the same mistake
            log(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        log("interrupted")
        sys.exit(130)
    except Exception as error:
        if "Connection closed by peer" in str(error):  # gloo's message; that process has printed why, or was killed
            log("error: Another process of this run ended.")
            sys.exit(1)
        if type(error).__name__ != "OutOfMemoryError":
            raise
        log("error: The GPU's memory is full; lower the batch size or the sequence length, or use fewer bits.")
        sys.exit(1)
