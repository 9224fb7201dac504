"""The checkpoint's own tokenizer: SentencePiece's or Hugging Face's."""

import hashlib
import json
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import SentencePieceProcessor

from lit_llama.utils import UserError

NAMES = ("tokenizer.model", "tokenizer.json")  # the first that a folder has


class SentencePiece:
    """A `tokenizer.model`: `bos_id` begins a text and `eos_id` ends it, -1 for none; `size` is one past the last id."""

    def __init__(self, content: bytes) -> None:
        if not content:
            raise RuntimeError("empty")
        self.processor = SentencePieceProcessor(model_proto=content)
        self.size = self.processor.vocab_size()
        self.bos_id, self.eos_id = self.processor.bos_id(), self.processor.eos_id()
        self.stop_ids = (self.eos_id, self.bos_id)

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)


class HuggingFace:
    """A `tokenizer.json`, whose special tokens are named in the `tokenizer_config.json` beside it.

    A text begins with the bos token only if the checkpoint's files say so: SmolLM2's and Qwen2's do not.
    """

    def __init__(self, content: bytes, named: dict[str, Any]) -> None:
        self.engine = tokenizers.Tokenizer.from_buffer(content)
        self.engine.encode_special_tokens = True  # as text
        self.engine.no_truncation()
        self.engine.no_padding()
        self.size = max(self.engine.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        bos, self.eos_id = (self._id(named.get(f"{name}_token")) for name in ("bos", "eos"))
        begins = named.get("add_bos_token")
        if not isinstance(begins, bool):
            begins = self.engine.encode("").ids[:1] == [bos]
        self.bos_id = bos if begins else -1
        self.stop_ids = (self.eos_id, bos)

    def _id(self, token: Any) -> int:
        """The id of a token's text, or of {"content": text}."""
        found = self.engine.token_to_id(token["content"] if isinstance(token, dict) else token or "")
        return -1 if found is None else found

    def encode(self, text: str) -> list[int]:
        return self.engine.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.engine.decode(ids)


class Tokenizer:
    """The tokenizer of a checkpoint folder, `tokenizer.model` if it has both kinds; or that of a file.

    Special tokens written out in a text stay text: only `bos=True` and `eos=True` add them, where the checkpoint has
    them. What its `generation_config.json` lists as eos ends an answer too.

    Raises:
        UserError: there is no such file, it is damaged, or nothing says what ends a text.
    """

    def __init__(self, path: Path) -> None:
        path = Path(path)
        if path.is_dir():
            path = next((path / name for name in NAMES if (path / name).is_file()), path / NAMES[0])
        if not path.is_file():
            raise UserError(f"There is no tokenizer at {path}; a checkpoint folder needs its {' or '.join(NAMES)}.")
        content = path.read_bytes()
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.engine = self._open(content)
        self.bos_id, self.eos_id, self.vocab_size = self.engine.bos_id, self.engine.eos_id, self.engine.size
        listed = self._beside("generation_config.json").get("eos_token_id")
        listed = [i for i in (listed if isinstance(listed, list) else [listed]) if isinstance(i, int)]
        if self.eos_id < 0 and listed:
            self.eos_id = listed[0]
        if self.eos_id < 0:
            raise UserError(
                f"{path} has no end-of-text token; name it in the tokenizer_config.json beside it, as eos_token."
            )
        stop = (self.eos_id, *listed, *self.engine.stop_ids)
        self.stop_ids = tuple(dict.fromkeys(i for i in stop if i >= 0))

    def _open(self, content: bytes) -> SentencePiece | HuggingFace:
        if self.path.suffix == ".json":
            named = self._beside("tokenizer_config.json")
            try:
                return HuggingFace(content, named)
            except Exception as error:  # the library raises nothing more special
                raise UserError(f"{self.path} is not a tokenizer of Hugging Face ({error}).") from None
        try:
            return SentencePiece(content)
        except RuntimeError:
            other = " A checkpoint's tokenizer.json is read where there is no tokenizer.model." * bool(content)
            raise UserError(f"{self.path} is not a SentencePiece model.{other}") from None

    def _beside(self, name: str) -> dict[str, Any]:
        """A JSON file of the checkpoint, empty if it has none."""
        path = self.path.parent / name
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}).") from None
        return content if isinstance(content, dict) else {}

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        return [self.bos_id] * (bos and self.bos_id >= 0) + self.engine.encode(text) + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        """Ids beyond the vocabulary (a padded model can emit them) decode to nothing."""
        return self.engine.decode([i for i in ids if i < self.vocab_size])
