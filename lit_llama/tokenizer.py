"""The tokenizer of a checkpoint, SentencePiece's or Hugging Face's."""

import hashlib
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import SentencePieceProcessor

from lit_llama.config import CONFIG_NAME, MOST_INT, LLaMAConfig
from lit_llama.storage.schema import check, field, read_bytes, read_json
from lit_llama.utils import UserError

NAMES = ("tokenizer.model", "tokenizer.json")  # if a folder has both, the first is used


class SentencePiece:
    """A `tokenizer.model`.

    Attributes:
        size: Number of tokens.
        bos_id: Token that begins a text, -1 for none.
        eos_id: Token that ends a text, -1 for none.
        stop_ids: Tokens that end generation.

    Args:
        content: Content of the file.
        config: Content of `tokenizer_config.json`. A text begins with BOS unless `add_bos_token` is false.
    """

    def __init__(self, content: bytes, config: dict[str, Any]) -> None:
        if not content:
            raise RuntimeError("empty")
        self.processor = SentencePieceProcessor(model_proto=content)
        self.size = self.processor.vocab_size()
        bos, self.eos_id = self.processor.bos_id(), self.processor.eos_id()
        self.bos_id = -1 if config.get("add_bos_token") is False else bos
        self.stop_ids = (self.eos_id, bos)

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)


class HuggingFace:
    """A `tokenizer.json`, with the attributes of `SentencePiece`.

    Args:
        content: Content of the file.
        config: Content of `tokenizer_config.json`, which names the special tokens. Whether a text begins with BOS is
            `add_bos_token`, or follows from the tokenizer's template: SmolLM2 and Qwen2 have none.
    """

    def __init__(self, content: bytes, config: dict[str, Any]) -> None:
        self.engine = tokenizers.Tokenizer.from_buffer(content)
        self.engine.encode_special_tokens = True  # as text
        self.engine.no_truncation()
        self.engine.no_padding()
        self.size = max(self.engine.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        bos, self.eos_id = (self._find(config.get(f"{name}_token")) for name in ("bos", "eos"))
        add_bos = config.get("add_bos_token")
        if not isinstance(add_bos, bool):
            add_bos = self.engine.encode("").ids[:1] == [bos]
        self.bos_id = bos if add_bos else -1
        self.stop_ids = (self.eos_id, bos)

    def _find(self, token: str | None) -> int:
        """Return the id of a token, -1 for none."""
        found = self.engine.token_to_id(token or "")
        return -1 if found is None else found

    def encode(self, text: str) -> list[int]:
        return self.engine.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.engine.decode(ids)


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    Special tokens that are written in a text are encoded as text; only `bos=True` and `eos=True` add them. The tokens
    that `generation_config.json` lists as EOS also end generation.

    Args:
        path: The folder, or one of its files `tokenizer.model` and `tokenizer.json`.

    Raises:
        UserError: The file is missing or damaged, or no token ends a text.
    """

    def __init__(self, path: Path) -> None:
        path = Path(path)
        if path.is_dir():
            path = next((path / name for name in NAMES if (path / name).is_file()), path / NAMES[0])
        if not path.is_file():
            raise UserError(f"There is no tokenizer at {path}; a checkpoint folder needs its {' or '.join(NAMES)}.")
        content = read_bytes(path)
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.engine = self._open(content)
        self.bos_id, self.eos_id, self.vocab_size = self.engine.bos_id, self.engine.eos_id, self.engine.size
        listed = self._read_beside("generation_config.json").get("eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        label = f"{path.parent / 'generation_config.json'}: eos_token_id"
        listed = [i for i in listed if check(i, int | None, label, least=-1, most=MOST_INT) is not None and i >= 0]
        if self.eos_id < 0 and listed:
            self.eos_id = check(listed[0], int, label, most=self.vocab_size - 1)
        if self.eos_id < 0:
            raise UserError(
                f"{path} has no end-of-text token; name it in the tokenizer_config.json beside it, as eos_token."
            )
        stop = (self.eos_id, *listed, *self.engine.stop_ids)
        self.stop_ids = tuple(dict.fromkeys(i for i in stop if i >= 0))
        if (path.parent / CONFIG_NAME).is_file():
            self.check_fit(LLaMAConfig.from_json(path.parent / CONFIG_NAME))

    def check_fit(self, config: LLaMAConfig) -> None:
        """Check that a model has all tokens.

        Raises:
            UserError: It has not.
        """
        if self.vocab_size > config.padded_vocab_size:
            raise UserError(
                f"{self.path} has {self.vocab_size:,} tokens and the model {config.padded_vocab_size:,}: they do not "
                "belong together."
            )

    @property
    def identity(self) -> dict[str, Any]:
        """All that token ids depend on: the file, and the tokens that begin and end a text."""
        return {"tokenizer_sha256": self.sha256, "bos_id": self.bos_id, "eos_id": self.eos_id}

    def _open(self, content: bytes) -> SentencePiece | HuggingFace:
        config, source = self._read_beside("tokenizer_config.json"), self.path.parent / "tokenizer_config.json"
        for name in ("bos_token", "eos_token"):
            if isinstance(token := field(config, name, str | dict, source, None), dict):
                config[name] = field(token, "content", str, f"{source}: {name}")
        if self.path.suffix.lower() == ".json":
            try:
                return HuggingFace(content, config)
            except Exception as error:  # the library raises nothing more specific
                raise UserError(f"{self.path} is not a tokenizer of Hugging Face ({error}).") from None
        try:
            return SentencePiece(content, config)
        except (RuntimeError, UnicodeDecodeError):  # an error text of the library may quote the file
            hint = " A checkpoint's tokenizer.json is read if there is no tokenizer.model." * bool(content)
            raise UserError(f"{self.path} is not a SentencePiece model.{hint}") from None

    def _read_beside(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file of the checkpoint, empty if there is none."""
        path = self.path.parent / name
        return read_json(path) if path.exists() else {}

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: The text.
            bos: Begin with BOS, if texts of this checkpoint do.
            eos: End with EOS.
        """
        return [self.bos_id] * (bos and self.bos_id >= 0) + self.engine.encode(text) + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids. Ids beyond the vocabulary, which a padded model can emit, are ignored."""
        return self.engine.decode([i for i in ids if i < self.vocab_size])
