"""Publish an adapter on the Hugging Face Hub, with a model card: its method, base, data, metrics and versions.

    python scripts/share.py --adapter out/aligner/alpaca-7b-n1 --repo_id me/alpaca-7b-n1 --license llama2

--dry_run only writes the folder that would be uploaded; a card that you edit there is kept and uploaded. The token
comes from `hf auth login` or HF_TOKEN. Absolute paths in the adapter's header are reduced to their last part. Anyone
with this repository and the base can then use it:
python generate/aligner.py --checkpoint_dir FOLDER_OF_THE_BASE --adapter hf:OWNER/NAME
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.settings import Checked


@dataclass
class Settings(Checked):
    adapter: Path = Path("out/aligner/microworld-pirate")  # adapter file, or a run folder for its best adapter
    repo_id: str = "OWNER/NAME"  # repository to write; created if it does not exist
    base_model: str | None = None  # the base's name on the Hub, such as meta-llama/Llama-2-7b-hf, for the card
    description: str | None = None  # what the adapter does, for the card
    license: str | None = None  # for the card, such as apache-2.0
    private: bool = False  # create a private repository
    output_dir: Path | None = None  # the folder that is uploaded (default: out/share/NAME)
    dry_run: bool = False  # write the folder, upload nothing
    overwrite: bool = False  # replace the adapter; the repository's history keeps the earlier version


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import hashlib
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi, errors, get_token
from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

from lit_llama.checkpoint import AdapterFile, read_adapter, save_adapter
from lit_llama.huggingface.hub import ADAPTER_NAME, PREFIX, endpoint, explain, repository
from lit_llama.run.report import read_metrics
from lit_llama.storage.files import claim, write_text
from lit_llama.storage.rows import read_text
from lit_llama.storage.schema import field
from lit_llama.utils import UserError, log

CARD = "README.md"
MARK = "<!-- written by scripts/share.py -->"


def without_folders(value: Any) -> Any:
    """Return a copy of JSON data in which absolute paths are reduced to their last part."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def metrics_of(adapter: AdapterFile) -> dict[str, float]:
    """Return the validation metrics at the adapter's step, from the metrics.csv next to it if there is one."""
    training, header = adapter.meta.get("training", {}), f"The header of {adapter.path}: training"
    step, loss = (field(training, name, kind, header, None) for name, kind in (("step", int), ("val_loss", float)))
    row = read_metrics(adapter.path.parent / "metrics.csv").get(step, {})
    metrics = {name.removeprefix("val/").replace("_", " "): x for name, x in row.items() if name.startswith("val/")}
    return metrics or ({} if loss is None else {"loss": loss})


def card(adapter: AdapterFile, settings: Settings) -> str:
    """Return the model card, from scripts/share_card.md.jinja."""
    meta, header = without_folders(adapter.meta), f"The header of {adapter.path}"
    training, data = meta.get("training", {}), meta.get("data", {})
    field(data, "source", str, f"{header}: data", "")
    dataset = field(data, "repo_id", str, f"{header}: data", "")
    counts = field(data, "counts", dict, f"{header}: data", {})
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    entries = dict(
        mark=MARK,
        repo_id=settings.repo_id,
        name=settings.repo_id.partition("/")[2],
        description=settings.description,
        license=settings.license,
        base_model=settings.base_model,
        dataset=dataset if re.fullmatch(r"([\w.-]+/)?[\w.-]+", dataset) else None,
        method=adapter.method,
        config=adapter.config,
        n_parameters=sum(t.numel() for t in adapter.state.values()),
        base=meta.get("base") or {},
        style=meta.get("prompt_style"),
        data=data,
        counts={name: field(counts, name, int, f"{header}: data: counts", 0) for name in ("train", "test")},
        step=field(training, "step", int, f"{header}: training", None),
        metrics=metrics_of(adapter),
        settings=field(training, "settings", dict, f"{header}: training", {}),
        versions=field(meta, "versions", dict, header, {}),
        merges=adapter.config.get("adapter_prompt_length") == 1 and adapter.method == "aligner",
    )
    try:
        return templates.get_template("share_card.md.jinja").render(entries)
    except (UndefinedError, TypeError, ValueError) as error:
        raise UserError(f"{header} does not describe an adapter that can be published ({error}).") from None


def signed(text: str) -> str:
    """Return a card with a hash of its text in the mark."""
    return text.replace(MARK, f"{MARK[:-4]}, {hashlib.sha256(text.encode()).hexdigest()[:16]} -->", 1)


def is_edited(text: str) -> bool:
    """Return whether a card differs from what `signed` returned."""
    unsigned = re.sub(rf"{MARK[:-4]}, [0-9a-f]{{16}} -->", MARK, text, count=1)
    return unsigned == text or signed(unsigned) != text


def check_repository(api: HfApi, settings: Settings) -> None:
    """Check that a repository is new, or has an adapter that may be replaced.

    Raises:
        UserError: It contains something else, or an adapter and `overwrite` is not set, or it is public and `private`
            is set.
    """
    try:
        info = api.model_info(settings.repo_id)
    except errors.RepositoryNotFoundError:
        return
    if settings.private and not info.private:
        raise UserError(f"{settings.repo_id} is public; make it private on the Hub, or leave out --private.")
    names = {file.rfilename for file in info.siblings}
    if ADAPTER_NAME in names and not settings.overwrite:
        raise UserError(f"{settings.repo_id} already has an adapter; replace it with --overwrite.")
    if ADAPTER_NAME not in names and names - {".gitattributes"}:
        raise UserError(f"{settings.repo_id} contains something other than an adapter; choose another --repo_id.")


@contextmanager
def hub(settings: Settings) -> Iterator[HfApi]:
    """Yield a client of the Hub, and turn its errors into a `UserError`."""
    if get_token() is None:
        raise UserError("There is no token for the Hub; log in with `hf auth login`, or set HF_TOKEN.")
    try:
        yield HfApi(endpoint=endpoint())
    except (OSError, RuntimeError, errors.HTTPError, errors.HFValidationError) as error:
        raise explain(error, settings.repo_id, "main", writes=True) from None
    except ValueError as error:  # a `UserError`, or the card is invalid
        if not str(error).startswith("Invalid metadata"):
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"The Hub refuses the model card ({reason}); change --license or --base_model.") from None


def main(settings: Settings) -> None:
    repository(PREFIX + settings.repo_id)
    if settings.repo_id == Settings.repo_id:
        raise UserError("Name the repository with --repo_id OWNER/NAME.")
    adapter = read_adapter(settings.adapter)
    if not settings.dry_run:
        with hub(settings) as api:
            check_repository(api, settings)
    folder = settings.output_dir or Path("out/share") / settings.repo_id.partition("/")[2]
    text = card(adapter, settings)
    claim(folder, (ADAPTER_NAME, CARD))
    about = {"method": adapter.method, "config": adapter.config, **without_folders(adapter.meta)}
    save_adapter(folder / ADAPTER_NAME, adapter.state, about, overwrite=True)
    if (folder / CARD).is_file() and is_edited(read_text(folder / CARD)):
        log(f"note: {folder / CARD} is kept: it was edited, or an earlier version wrote it. Delete it for a new card.")
    else:
        write_text(folder / CARD, signed(text))
    if settings.dry_run:
        print(folder)
        return
    with hub(settings) as api:
        api.create_repo(settings.repo_id, private=settings.private, exist_ok=True)
        done = api.upload_folder(repo_id=settings.repo_id, folder_path=folder, allow_patterns=[ADAPTER_NAME, CARD],
                                 commit_message="Adapter and its card")  # fmt: skip
    print(done.commit_url)
    training, header = adapter.meta.get("training", {}), f"The header of {adapter.path}: training"
    trained_on = field(training, "settings", dict, header, {})
    base = shlex.quote(str(trained_on.get("checkpoint_dir", "FOLDER_OF_THE_BASE")))
    log(f"generate with it: python generate/aligner.py --checkpoint_dir {base} --adapter {PREFIX}{settings.repo_id}")


if __name__ == "__main__":
    cli.run(main, settings)
