"""Download a model for conversion from huggingface.co: its configuration, weights and tokenizer.

If the weights exist in several formats, only the safetensors are downloaded. An interrupted download continues where it
stopped; only a file that was being copied from the cache of huggingface_hub must be deleted first. For a model that
requires accepting a license, log in first: hf auth login
"""

import fnmatch
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.settings import Checked


@dataclass
class Settings(Checked):
    repo_id: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # OWNER/NAME of the model
    revision: str = "main"  # branch, tag or commit
    output_dir: Path | None = None  # folder to write (default: checkpoints/hf/NAME)


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download

from lit_llama.huggingface.config import convert_config
from lit_llama.huggingface.hub import endpoint, explain
from lit_llama.huggingface.tokenizer_files import TOKENIZER_FILES
from lit_llama.huggingface.weights import WEIGHTS
from lit_llama.storage.schema import read_json
from lit_llama.storage.tensor_files import check_free
from lit_llama.tokenizer import NAMES
from lit_llama.utils import UserError, log

SHARDS = {"safetensors": "model-*-of-*.safetensors", "bin": "pytorch_model-*-of-*.bin"}


def wanted(names: list[str], repo_id: str) -> list[str]:
    """Return the files of a repository that a conversion reads.

    Raises:
        UserError: There are no weights, no configuration or no tokenizer.
    """
    names = [name for name in names if "/" not in name]  # the shard pattern would match paths too
    chosen = [name for name in ("config.json", *TOKENIZER_FILES) if name in names]
    for single, index, shards in ((*WEIGHTS[:2], SHARDS["safetensors"]), (*WEIGHTS[2:], SHARDS["bin"])):
        if weights := [single] if single in names else [index] * (index in names) + fnmatch.filter(names, shards):
            break
    if not weights or "config.json" not in names:
        raise UserError(f"{repo_id} has no model to convert: it needs config.json and one of {', '.join(WEIGHTS)}.")
    if not set(NAMES) & set(names):
        raise UserError(f"{repo_id} has no tokenizer that can be converted: it needs {' or '.join(NAMES)}.")
    return chosen + weights


def check_strangers(folder: Path, sizes: dict[str, int]) -> None:
    """Check that the files to download do not exist, or are as huggingface_hub wrote them according to its records.

    Args:
        folder: The folder to download to.
        sizes: Sizes of the files on the Hub, in bytes, by name.

    Raises:
        UserError: A file exists that was not downloaded, or only in part, or that was changed since.
    """
    for name, size in sizes.items():
        record = folder / ".cache/huggingface/download" / f"{name}.metadata"
        if not os.path.lexists(folder / name):
            continue
        if not record.is_file():
            sentence = f"{folder / name} exists and was not downloaded here"
            present = os.lstat(folder / name)
            if stat.S_ISREG(present.st_mode) and present.st_size < size:
                raise UserError(
                    f"{sentence}, or only in part ({present.st_size:,} of {size:,} bytes); if a download was "
                    "interrupted, delete this file and run again, else choose another --output_dir."
                )
            raise UserError(f"{sentence}; choose another --output_dir.")
        try:
            downloaded = float(record.read_text(encoding="utf-8").splitlines()[2])
        except (ValueError, IndexError):
            raise UserError(f"{record} is damaged; delete it and {folder / name} to download the file again.") from None
        # huggingface_hub, too, allows for a second; it would replace the file
        if os.lstat(folder / name).st_mtime > downloaded + 1:
            raise UserError(
                f"{folder / name} is newer than its download, so you may have edited it; move it away, or choose "
                "another --output_dir."
            )


def download(repo_id: str, revision: str, folder: Path) -> None:
    """Download the files of a model to a folder, after checking that they can be converted and written."""
    info = HfApi(endpoint=endpoint()).model_info(repo_id, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    names = wanted(list(sizes), repo_id)
    config = hf_hub_download(repo_id, "config.json", revision=info.sha, endpoint=endpoint())  # to the cache
    convert_config(read_json(Path(config)))
    check_strangers(folder, {name: sizes[name] for name in names})
    check_free(folder, sum(sizes[name] for name in names if not (folder / name).is_file()))
    log(f"{len(names)} files, {sum(sizes[name] for name in names) / 1e9:.2f} GB, to {folder}")
    snapshot_download(repo_id, revision=info.sha, local_dir=folder, allow_patterns=names, endpoint=endpoint())


def main(settings: Settings) -> None:
    folder = settings.output_dir or Path("checkpoints/hf") / settings.repo_id.split("/")[-1]
    try:
        download(settings.repo_id, settings.revision, folder)
    except (OSError, RuntimeError, errors.HTTPError, errors.HFValidationError) as error:  # hf_xet raises RuntimeError
        raise explain(error, settings.repo_id, settings.revision) from None
    print(folder)


if __name__ == "__main__":
    cli.run(main, settings)
