"""The checkpoint's own tokenizer."""

import hashlib
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from lit_llama.utils import UserError


class Tokenizer:
    """SentencePiece, from a checkpoint folder or a `tokenizer.model` file.

    Special tokens written out in a text stay text: only `bos=True` and `eos=True` add them.

    Raises:
        UserError: there is no such file, or it is not a SentencePiece model.
    """

    def __init__(self, path: Path) -> None:
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.model"
        if not path.is_file():
            raise UserError(f"There is no tokenizer at {path}; a checkpoint folder needs its tokenizer.model.")
        content = path.read_bytes()
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            if not content:
                raise RuntimeError("empty")
            self.processor = SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise UserError(f"{path} is not a SentencePiece model.") from None
        self.bos_id = self.processor.bos_id()
        self.eos_id = self.processor.eos_id()

    @property
    def vocab_size(self) -> int:
        return self.processor.vocab_size()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the end of the text, and the beginning of another."""
        return tuple(i for i in (self.eos_id, self.bos_id) if i >= 0)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        ids = self.processor.encode(text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        """Ids beyond the vocabulary (a padded model can emit them) decode to nothing."""
        return self.processor.decode([i for i in ids if i < self.vocab_size])
