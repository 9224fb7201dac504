"""The Hugging Face Hub: adapters named `hf:owner/name`, and error messages."""

import errno
import os
import re
from pathlib import Path

from lit_llama.storage.files import NO_ROOM, TOO_LARGE, unwritable
from lit_llama.utils import UserError

PREFIX = "hf:"
ADAPTER_NAME = "adapter.safetensors"  # the only file that is read: no pickle, and no code


def is_on_hub(path: Path | str) -> bool:
    """Return whether a path names a repository on the Hub, such as `hf:owner/name`."""
    return str(path).startswith(PREFIX)


def repository(path: Path | str) -> tuple[str, str]:
    """Return the owner/name and the revision of `hf:owner/name` or `hf:owner/name@revision`.

    Raises:
        UserError: The path has another format.
    """
    match = re.fullmatch(rf"{PREFIX}([\w.-]+/[\w.-]+?)(?:@([^@\s]+))?", str(path))
    if match is None:
        raise UserError(f"{str(path)!r} does not name an adapter on the Hub; write it like hf:owner/name@revision.")
    return match[1], match[2] or "main"


def download_adapter(path: Path | str) -> Path:
    """Return the file of an adapter on the Hub, in the cache of huggingface_hub.

    Args:
        path: `hf:owner/name` or `hf:owner/name@revision`, a branch, tag or commit.

    Raises:
        UserError: It cannot be downloaded and is not in the cache.
    """
    from huggingface_hub import errors, hf_hub_download

    repo_id, revision = repository(path)
    try:
        return Path(hf_hub_download(repo_id, ADAPTER_NAME, revision=revision, endpoint=endpoint()))
    except (OSError, RuntimeError, errors.HTTPError, errors.HFValidationError) as error:  # hf_xet raises RuntimeError
        raise explain(error, repo_id, revision) from None


def endpoint() -> str:
    """Return the address of the Hub, which HF_ENDPOINT overrides."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def explain(error: Exception, repo_id: str, revision: str, *, writes: bool = False) -> UserError:
    """Return a sentence for an error of huggingface_hub; `writes` says that the repository was to be written."""
    from huggingface_hub import errors

    page, log_in = f"{endpoint()}/{repo_id}", "log in with `hf auth login`, or set HF_TOKEN"
    status = getattr(getattr(error, "response", None), "status_code", None)
    message = " ".join((getattr(error, "server_message", None) or "").split()).rstrip(".")
    hub_says = f" (the Hub says: {message})" if message else ""
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{repo_id} is behind a license: accept it at {page}, then {log_in} and run again{hub_says}.")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{repo_id} has no branch, tag or commit {revision!r}.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(f"There is no model {repo_id} that you may see; check {page}, or {log_in}.")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return UserError(f"{repo_id} is not in the cache, and {endpoint()} cannot be reached; check the network.")
    if isinstance(error, errors.EntryNotFoundError):
        return UserError(f"{repo_id} has no {ADAPTER_NAME}: it was not written by scripts/share.py.")
    if isinstance(error, errors.HFValidationError):
        return UserError(f"{repo_id!r} is not the name of a model; write it like meta-llama/Llama-2-7b-hf.")
    if status == 401:
        return UserError(f"{endpoint()} does not accept your token; {log_in}.")
    if status == 403:
        tokens = f"{endpoint()}/settings/tokens"
        access = "write to" if writes else "read"
        return UserError(
            f"Your token has no permission to {access} {repo_id}; create one that has at {tokens}{hub_says}."
        )
    file, number = getattr(error, "filename", None), getattr(error, "errno", None)
    texts = (*NO_ROOM, TOO_LARGE)  # also of hf_xet
    if file or number in (errno.ENOSPC, errno.EDQUOT) or any(text in str(error) for text in texts):
        return unwritable(Path(file or "the download"), error)
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    if isinstance(error, RuntimeError):
        done = "uploaded" if writes else "downloaded"
        return UserError(f"{repo_id} could not be {done} ({reason}); run again to continue.")
    return UserError(f"{repo_id} cannot be reached at {endpoint()} ({reason}); run again to continue.")
