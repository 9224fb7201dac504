"""The folder for results that can be computed again: tokenized rows, and log-probabilities of a DPO reference."""

from pathlib import Path

from lit_llama.files import unwritable

NAME = ".aligner-cache"
FILES = {
    # https://bford.info/cachedir: backup programs skip folders with this file
    "CACHEDIR.TAG": "Signature: 8a477f597d28d172789f06886806bc55\n",
    "README": "Tokenized rows and log-probabilities of DPO references. This folder may be deleted at any time.\n",
}


def cache_folder(data_dir: Path) -> Path:
    """Return the cache folder beside a dataset folder. It is created if it does not exist.

    Raises:
        UserError: The folder cannot be written.
    """
    folder = Path(data_dir).parent / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in FILES.items():
            if not (folder / name).is_file():
                (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritable(folder, error) or error from None
    return folder
