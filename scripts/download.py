"""Downloads from huggingface.co what the conversion of a model needs: configuration, weights, tokenizer.

Of weights in several formats only the safetensors are taken. A download that was interrupted goes on where it stopped.
For a model behind a licence log in first, with: hf auth login
"""

import fnmatch
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from huggingface_hub import HfApi, errors, snapshot_download

from lit_llama import cli
from lit_llama.hf import WEIGHTS
from lit_llama.hf_tokenizer import TOKENIZER_FILES
from lit_llama.utils import UserError, log


@dataclass
class Settings:
    repo_id: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # OWNER/NAME of the model
    revision: str = "main"  # branch, tag or commit
    output_dir: Path | None = None  # the folder to write (default: checkpoints/hf/NAME)


SHARDS = {"safetensors": "model-*-of-*.safetensors", "bin": "pytorch_model-*-of-*.bin"}


def wanted(names: list[str], repo_id: str) -> list[str]:
    """Those of a repository's files that a conversion reads.

    Raises:
        UserError: there are no weights or no configuration.
    """
    names = [name for name in names if "/" not in name]  # the pattern of shards would match paths too
    chosen = [name for name in ("config.json", *TOKENIZER_FILES) if name in names]
    for whole, index, shards in ((*WEIGHTS[:2], SHARDS["safetensors"]), (*WEIGHTS[2:], SHARDS["bin"])):
        if weights := [whole] if whole in names else [index] * (index in names) + fnmatch.filter(names, shards):
            break
    if not weights or "config.json" not in names:
        raise UserError(f"{repo_id} holds no model to convert: it needs config.json and one of {', '.join(WEIGHTS)}.")
    return chosen + weights


def check_strangers(folder: Path, names: list[str]) -> None:
    """Check that the files to download are new, or that huggingface_hub records that it wrote them.

    Raises:
        UserError: One exists that was not downloaded.
    """
    for name in names:
        record = folder / ".cache/huggingface/download" / f"{name}.metadata"
        if os.path.lexists(folder / name) and not record.is_file():
            raise UserError(f"{folder / name} exists and was not downloaded here; choose another --output_dir.")


def main(args: Settings) -> None:
    folder = args.output_dir or Path("checkpoints/hf") / args.repo_id.split("/")[-1]
    endpoint = os.environ.get("HF_ENDPOINT")
    page = f"https://huggingface.co/{args.repo_id}"
    try:
        info = HfApi(endpoint=endpoint).model_info(args.repo_id, revision=args.revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings}
        names = wanted(list(sizes), args.repo_id)
        check_strangers(folder, names)
        needed = sum(sizes[name] for name in names if not (folder / name).is_file())
        existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
        if needed > (free := shutil.disk_usage(existing).free):
            raise UserError(
                f"{args.repo_id} takes {needed / 1e9:.2f} GB and the disk of {folder} has {free / 1e9:.2f} GB free."
            )
        log(f"{len(names)} files, {sum(sizes[name] for name in names) / 1e9:.2f} GB, to {folder}")
        snapshot_download(args.repo_id, revision=info.sha, local_dir=folder, allow_patterns=names, endpoint=endpoint)
    except errors.GatedRepoError:
        raise UserError(
            f"{args.repo_id} is behind a licence: accept it at {page}, then log in with `hf auth login` and run again."
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{args.repo_id} has no branch, tag or commit {args.revision!r}.") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"There is no model {args.repo_id} that you may see; check {page}, or log in with `hf auth login`."
        ) from None
    except errors.HFValidationError:
        raise UserError(f"{args.repo_id!r} is no name of a model; it is like meta-llama/Llama-2-7b-hf.") from None
    except (OSError, errors.HTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"The download of {args.repo_id} failed ({reason}); run again to go on.") from None
    print(folder)


if __name__ == "__main__":
    cli.run(main, Settings)
