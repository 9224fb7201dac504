"""Download the authors' published adapters for Llama 2 and check each file against its known sha256.

Files that exist already are kept. One of the published files is not a checkpoint and is skipped.
"""

import hashlib
import http.client
import sys
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.resolve()))  # run without installing

from lit_llama import cli
from lit_llama.settings import Checked


@dataclass
class Settings(Checked):
    output_dir: Path = Path("aligner_weights/published")  # folder to write, with the authors' subfolders
    overwrite: bool = False  # replace existing files of the same names whose content differs
    source: str = "https://raw.githubusercontent.com/mytemporalaccount/Aligner/HEAD/aligner_weights"  # sha256-checked


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

from tqdm import tqdm

from lit_llama.storage.files import atomic_write, check_file
from lit_llama.utils import UserError, log

ALPACA = "Alpaca_Instruction_Following_Supervised_Finetuning"
META_MATH = "MetaMath_Supervised_Finetuning"
BEAVER = "PKU-Beaver-DPO-Value-Alignment"
# path -> sha256
# fmt: off
FILES = {
    f"{ALPACA}/aligner1Token-llama2-7B-lr0.009bs64weightDecay0.02wu2-epoch-8.0-valloss0.9565.pth":
        "29cb4f63ed908658f42a501343055f311a87142df10b69d8bb1708a98f3bb472",
    f"{ALPACA}/aligner1Token-llama2-13B-lr0.009bs64weightDecay0.02wu2-epoch-8.0-valloss0.8858.pth":
        "0bb899ab340f66134dfc29301ec294a986177984bb075fe15e313d6e5681f19d",
    f"{ALPACA}/aligner10Token-llama2-13B-lr0.009bs64weightDecay0.02wu2-epoch-8.00-valloss0.876914.pth":
        "c7dba9d08c6c6d2eab08e6acde097bc4a89231415e3050e974c8e06456973b27",
    f"{META_MATH}/aligner1token-llama2-7B-lr0.009bs64-wu1-epoch-3.0-valloss0.7474.pth":
        "ac050dfefd2f32312f1559925bbc4cb728b0f3eb9b973980be0a860e31223267",
    f"{META_MATH}/aligner10token-llama2-7B-lr0.009bs64-wu1-epoch-3.0-valloss0.7005.pth":
        "f78c32da40b8b70ecb5846d03b9354d082dd7243e3e9f743d8872aa7d09cd181",
    f"{META_MATH}/aligner100token-llama2-7B-lr0.009bs64-wu1-epoch-3.0-epoch-3.0-valloss0.6433.pth":
        "c03706a2e0b760c008a2c4f1691e290a82760b3a701ff53733f6e453b13a7baa",
    f"{META_MATH}/aligner300token-llama2-7B-lr0.009bs64-wu1-epoch-3.0-valloss0.6130.pth":
        "69ca8ff43686efb5827ef3d8f106f1a250c079f99ce5147a27608da5b465bf19",
    f"{BEAVER}/BeaverDatasetSafetyPartSFTOnly/aligner1token-llama2-7B-epoch-2.0.pth":
        "a8783e0487f4c4ea0d39172a9b8d8c2d02c798c8652ff670961f550031a25877",
    f"{BEAVER}/aligner1token-llama2-7B-DPO-epoch-3.0-iter-059999.pth":
        "1dbb5c2f60b21de471e5eadfa6fa44e66522945d55719bc13ee834f1f30bb755",
}
# fmt: on
BROKEN = f"{ALPACA}/aligner10Tokens-llama2-7B-lr0.009bs64weightDecay0.02wu2-epoch-8.0-valloss0.9489.pth"
LARGEST = 10_000_000  # bytes; the files have up to 2.5 MB


def fetch(url: str) -> bytes:
    """Return the content at a URL.

    Raises:
        UserError: It cannot be downloaded.
    """
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.read(LARGEST)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url} returned HTTP {error.code} ({error.reason}).") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"Cannot read {url} ({reason}); check the network and run again.") from None


def is_complete(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def main(settings: Settings) -> None:
    missing = {name: sha256 for name, sha256 in FILES.items() if not is_complete(settings.output_dir / name, sha256)}
    for name in missing:
        check_file(settings.output_dir / name, overwrite=settings.overwrite)
    log(f"skipped: {BROKEN}, which is not a checkpoint but a text file of questions and answers")
    for name, sha256 in tqdm(missing.items(), desc="Fetching", unit="file"):
        content = fetch(f"{settings.source.rstrip('/')}/{urllib.parse.quote(name)}")
        if (got := hashlib.sha256(content).hexdigest()) != sha256:
            raise UserError(
                f"{name} from {settings.source} is not the published file: its sha256 begins with {got[:12]}, not "
                f"with {sha256[:12]}."
            )
        with atomic_write(settings.output_dir / name, overwrite=settings.overwrite) as temporary:
            temporary.write_bytes(content)
    log(f"{len(missing)} fetched, {len(FILES) - len(missing)} existed")
    print(settings.output_dir)


if __name__ == "__main__":
    cli.run(main, settings)
