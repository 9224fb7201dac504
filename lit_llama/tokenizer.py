"""The tokenizer of a checkpoint, in SentencePiece's or Hugging Face's format."""

import hashlib
import json
import re
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from lit_llama.chat_template import GUARD, ChatTemplate, ChatText, read_chat_template
from lit_llama.config import CONFIG_NAME, MOST_INT, LLaMAConfig
from lit_llama.storage.schema import check, field, parse_json, read_bytes, read_json
from lit_llama.utils import UserError

NAMES = ("tokenizer.model", "tokenizer.json")  # if a folder has both, the first is used
TEMPLATE_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class SentencePiece:
    """A `tokenizer.model`.

    Attributes:
        size: Number of tokens.
        bos_id: Token that begins a text, -1 for none.
        eos_id: Token that ends a text, -1 for none.
        stop_ids: Tokens that end generation.
        control: Ids of the special tokens, by their texts.
        added: Ids of further tokens that are never split, such as `<think>`.

    Args:
        content: Content of the file.
        config: Content of `tokenizer_config.json`. A text begins with BOS unless `add_bos_token` is false. Special
            tokens that it adds or lists are special even if the file has them as ordinary pieces.
    """

    def __init__(self, content: bytes, config: dict[str, Any]) -> None:
        if not content:
            raise RuntimeError("empty")
        self.processor = SentencePieceProcessor(model_proto=content)
        self.size, unknown = self.processor.vocab_size(), self.processor.unk_id()
        texts = [self.processor.id_to_piece(i) for i in range(self.size)]
        self.control = {text: i for i, text in enumerate(texts) if self.processor.is_control(i)}
        ordinary = {text: i for i, text in enumerate(texts) if text not in self.control and i != unknown}
        special, others = listed_tokens(config)
        for text, i in special.items():
            if text in ordinary or (i is not None and i >= self.size):
                self.control[text] = ordinary.get(text, i)
        self.added = {t: i for t, i in others.items() if i >= self.size and t not in self.control and t not in ordinary}
        self.texts = {i: text for text, i in self.added.items()}
        if listed := ordinary.keys() & self.control.keys():
            self.processor = SentencePieceProcessor(model_proto=as_control(content, listed))
        bos, self.eos_id = self.processor.bos_id(), self.processor.eos_id()
        self.bos_id = -1 if config.get("add_bos_token") is False else bos
        self.stop_ids = (self.eos_id, bos)

    @cached_property
    def tokens(self) -> re.Pattern:
        longest_first = sorted({*self.control, *self.added}, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def encode_chat(self, text: str) -> list[int]:
        """Return the token ids of a text with its `control` and `added` tokens, unless a `GUARD` interrupts them."""
        ids, tokens = [], self.control | self.added
        for part in self.tokens.split(text):
            ids += [tokens[part]] if part in tokens else self.encode(part.replace(GUARD, ""))
        return ids

    def decode(self, ids: list[int]) -> str:
        if self.texts.keys().isdisjoint(ids):
            return self.processor.decode([i for i in ids if i < self.size])
        # the library keeps the texts of pieces that it does not know
        pieces = [self.texts.get(i) or self.processor.id_to_piece(i) for i in ids if i < self.size or i in self.texts]
        return self.processor.decode(pieces)


def as_control(content: bytes, texts: set[str]) -> bytes:
    """Return a `tokenizer.model` in which some pieces are control tokens, into which no text is encoded."""
    model = ModelProto.FromString(content)
    for piece in model.pieces:
        if piece.piece in texts:
            piece.type = piece.CONTROL
    return model.SerializeToString()


class HuggingFace:
    """A `tokenizer.json`, with the attributes of `SentencePiece`.

    Args:
        content: Content of the file.
        config: Content of `tokenizer_config.json`, which names the special tokens. `add_bos_token` sets whether a text
            begins with BOS; without it, the tokenizer's post-processor does (SmolLM2 and Qwen2 add none).
    """

    def __init__(self, content: bytes, config: dict[str, Any]) -> None:
        self.content, self.config = content, config
        self.engine = self._open(content, specials_as_text=True)
        vocabulary = self.engine.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values(), default=-1) + 1
        tokens = self.engine.get_added_tokens_decoder().items()
        self.control, self.added = ({t.content: i for i, t in tokens if t.special is s} for s in (True, False))
        bos, self.eos_id = (vocabulary.get(config.get(f"{name}_token") or "", -1) for name in ("bos", "eos"))
        add_bos = config.get("add_bos_token")
        if not isinstance(add_bos, bool):
            add_bos = self.engine.encode("").ids[:1] == [bos]
        self.bos_id = bos if add_bos else -1
        self.stop_ids = (self.eos_id, bos)
        self.byte_ids = [vocabulary.get(f"<0x{byte:02X}>", -1) for byte in range(256)]
        has_bytes = min(self.byte_ids) >= 0 and self.engine.decode([self.byte_ids[ord("A")]]) == "A"
        self.byte_of = {i: byte for byte, i in enumerate(self.byte_ids)} if has_bytes else {}

    def __reduce__(self) -> tuple[Any, ...]:  # the engine's pickle loses `encode_special_tokens`
        return HuggingFace, (self.content, self.config), {"size": self.size, "added": self.added}

    def _open(self, content: bytes, specials_as_text: bool) -> tokenizers.Tokenizer:
        engine = tokenizers.Tokenizer.from_buffer(content)
        engine.encode_special_tokens = specials_as_text
        engine.no_truncation()
        engine.no_padding()
        known = {token.content: token for token in engine.get_added_tokens_decoder().values()}
        for text in listed_tokens(self.config)[0]:
            if text in known and not known[text].special:
                known[text].special = True
                engine.add_special_tokens([known[text]])
        return engine

    def encode(self, text: str) -> list[int]:
        return self.engine.encode(text, add_special_tokens=False).ids

    def encode_chat(self, text: str) -> list[int]:
        """Return the token ids of a text in which `control` tokens are special unless a `GUARD` interrupts them."""
        encoding = self._with_specials.encode(text, add_special_tokens=False)
        if GUARD not in text and max(encoding.ids, default=-1) < self.size:
            return encoding.ids
        tokens, ids, end = {*self.control.values(), *self.added.values()}, [], 0
        for i, (start, next_end) in zip(encoding.ids, encoding.offsets, strict=True):
            if i in tokens:
                ids += [*self._between(text[end:start], first=not ids), i]
                end = next_end
        return ids + self._between(text[end:], first=not ids)

    def _between(self, text: str, first: bool) -> list[int]:
        text, engine = text.replace(GUARD, ""), self._texts[0 if first else 1]
        return engine.encode(text, add_special_tokens=False).ids if text else []

    @cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        return self._open(self.content, specials_as_text=False)

    @cached_property
    def _texts(self) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
        """Tokenizers that encode special and added tokens as text: one for the beginning of a text, one for the rest.

        They differ if the tokenizer puts a space before the first word of a text.
        """
        parsed = parse_json(self.content, "tokenizer.json")
        for token in parsed.get("added_tokens", ()):
            token["special"] = token["special"] or bool(token["content"].strip())
        engines = [self._open(json.dumps(parsed).encode(), specials_as_text=True)]
        steps = parsed.get("pre_tokenizer") or {}
        for step in steps.get("pretokenizers", [steps]):
            if step.get("prepend_scheme") == "first":
                step["prepend_scheme"] = "never"
        return engines[0], self._open(json.dumps(parsed).encode(), specials_as_text=True)

    def decode(self, ids: list[int]) -> str:
        text = self.engine.decode(ids)
        if "\ufffd" not in text or not self.byte_of:
            return text
        # if a character is incomplete, the library replaces all byte tokens next to it; SentencePiece only its bytes
        parts: list[int] = []
        for is_byte, run in groupby(ids, self.byte_of.__contains__):
            if is_byte:
                text = bytes(map(self.byte_of.__getitem__, run)).decode(errors="surrogateescape")
                run = [self.byte_ids[byte] for byte in re.sub("[\udc80-\udcff]", "\ufffd", text).encode()]
            parts += run
        return self.engine.decode(parts)


def listed_tokens(config: dict[str, Any]) -> tuple[dict[str, int | None], dict[str, int]]:
    """Return the special tokens in a `tokenizer_config.json`, with their ids if it has them, and its other tokens."""
    special, others = {}, {}
    listed = [config.get("additional_special_tokens"), config.get("extra_special_tokens")]
    for tokens in (list(t.values()) if isinstance(t, dict) else t for t in listed):
        for token in tokens if isinstance(tokens, list) else ():
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and text:
                special[text] = None
    added = config.get("added_tokens_decoder")
    for i, token in added.items() if isinstance(added, dict) else ():
        text = token.get("content") if isinstance(token, dict) else None
        if isinstance(text, str) and text and i.isdecimal() and int(i) <= MOST_INT:
            (special if token.get("special") is True else others)[text] = int(i)
    return special, others


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    Special tokens that are spelled out in a text are encoded as text; only `bos=True`, `eos=True` and chat templates
    add special tokens. Generation ends at EOS, at the tokens that `generation_config.json` lists as EOS, and at the
    token with which the chat template ends an answer.

    Attributes:
        template: The chat template of the checkpoint, None if it has none.

    Args:
        path: The folder, or one of its files `tokenizer.model` and `tokenizer.json`.

    Raises:
        UserError: The file is missing or damaged, or it has no EOS.
    """

    def __init__(self, path: Path) -> None:
        path = Path(path)
        if path.is_dir():
            path = next((path / name for name in NAMES if (path / name).is_file()), path / NAMES[0])
        elif path.suffix not in (".model", ".json") and not path.exists():
            raise UserError(f"There is no checkpoint folder at {path}; howto/weights.md explains how to get one.")
        if not path.is_file():
            raise UserError(f"There is no tokenizer at {path}; a checkpoint folder needs its {' or '.join(NAMES)}.")
        content, self.path = read_bytes(path), path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.engine = self._open(content, path)
        self.bos_id, self.eos_id, self.vocab_size = self.engine.bos_id, self.engine.eos_id, self.engine.size
        listed = self._read_beside("generation_config.json").get("eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        label = f"{path.parent / 'generation_config.json'}: eos_token_id"
        listed = [i for i in listed if check(i, int | None, label, least=-1, most=MOST_INT) is not None and i >= 0]
        if self.eos_id < 0 and listed:
            self.eos_id = check(listed[0], int, label, most=self.vocab_size - 1)
        if self.eos_id < 0:
            raise UserError(f"{path} has no end-of-text token; name it in the tokenizer_config.json, as eos_token.")
        self.template = self._open_template()
        chat = self.engine if self.template is None else self.chat_engine
        end_of_turn = (chat.control | chat.added).get(self.template and self.template.end_of_turn, -1)
        stop = (self.eos_id, *listed, end_of_turn, *self.engine.stop_ids)
        self.stop_ids = tuple(dict.fromkeys(i for i in stop if i >= 0))
        if (path.parent / CONFIG_NAME).is_file():
            self.check_fit(config := LLaMAConfig.from_json(path.parent / CONFIG_NAME))
            chat.size = min(chat.size, config.padded_vocab_size)  # added tokens beyond it stay text
            chat.added = {text: i for text, i in chat.added.items() if i < config.padded_vocab_size}
            tokens = {i for e in (self.engine, chat) for i in (*e.control.values(), *e.added.values())}
            self.vocab_size = max([self.vocab_size, *(i + 1 for i in tokens if i < config.padded_vocab_size)])

    def check_fit(self, config: LLaMAConfig) -> None:
        """Check that a model's vocabulary has all tokens.

        Raises:
            UserError: It has fewer.
        """
        size, most = self.engine.size, config.padded_vocab_size
        if size > most:
            raise UserError(f"{self.path} has {size:,} tokens and the model {most:,}: they do not belong together.")

    @property
    def identity(self) -> dict[str, Any]:
        """What token ids depend on: the file, BOS and EOS. For chats, see also `lit_llama.data.hash_chat_tokens`."""
        return {"tokenizer_sha256": self.sha256, "bos_id": self.bos_id, "eos_id": self.eos_id}

    @cached_property
    def chat_engine(self) -> SentencePiece | HuggingFace:
        """The tokenizer for chats: `tokenizer.json` if there is one, as in other programs."""
        path = self.path.parent / "tokenizer.json"
        if self.path.suffix.lower() == ".json" or not path.is_file():
            return self.engine
        return self._open(read_bytes(path), path)

    def _open_template(self) -> ChatTemplate | None:
        if (template := read_chat_template(self.path.parent)) is None:
            return None
        names = {**self._read_beside("special_tokens_map.json"), **self._read_beside("tokenizer_config.json")}
        names = {n: t.get("content") if isinstance(t, dict) else t for n, t in names.items() if n in TEMPLATE_NAMES}
        texts = {i: text for text, i in self.chat_engine.control.items()}
        names = {"bos_token": texts.get(self.bos_id), "eos_token": texts.get(self.eos_id), **names}
        names = {name: text for name, text in names.items() if isinstance(text, str)}
        return ChatTemplate(*template, names, self.chat_engine.control, self.chat_engine.added)

    def _open(self, content: bytes, path: Path) -> SentencePiece | HuggingFace:
        config, source = self._read_beside("tokenizer_config.json"), self.path.parent / "tokenizer_config.json"
        for name in ("bos_token", "eos_token"):
            if isinstance(token := field(config, name, str | dict, source, None), dict):
                config[name] = field(token, "content", str, f"{source}: {name}")
        if path.suffix.lower() == ".json":
            try:
                return HuggingFace(content, config)
            except Exception as error:  # the library raises nothing more specific
                raise UserError(f"{path} is not a tokenizer of Hugging Face ({error}).") from None
        try:
            return SentencePiece(content, config)
        except (RuntimeError, UnicodeDecodeError):  # an error text of the library may quote the file
            hint = " A checkpoint's tokenizer.json is read if there is no tokenizer.model." * bool(content)
            raise UserError(f"{path} is not a SentencePiece model.{hint}") from None

    def _read_beside(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file of the checkpoint, empty if there is none."""
        return read_json(path) if (path := self.path.parent / name).exists() else {}

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: The text. A `ChatText` already contains all special tokens, so the other arguments have no effect.
            bos: Begin with BOS, if texts of this checkpoint do.
            eos: End with EOS.
        """
        if isinstance(text, ChatText):
            return self.chat_engine.encode_chat(text)
        return [self.bos_id] * (bos and self.bos_id >= 0) + self.engine.encode(text) + [self.eos_id] * eos

    def encode_response(self, prompt: str, response: str) -> list[int]:
        """Return the token ids of a response, for training; the last one ends it.

        Args:
            prompt: The prompt before it.
            response: The response, from `PromptStyle.reply`.

        Raises:
            UserError: A token of a chat would contain the end of the prompt and the beginning of the response.
        """
        if not isinstance(prompt, ChatText):
            return self.encode(response, eos=True)
        before, ids = self.encode(prompt), self.encode(prompt + response)
        self.check_boundary(before, ids)
        ids = ids[len(before) :]
        return ids if ids[-1:] and ids[-1] in self.stop_ids else [*ids, self.eos_id]

    def check_boundary(self, before: list[int], ids: list[int]) -> None:
        """Check that the token ids of a chat begin with those of its beginning, `before`.

        Raises:
            UserError: They do not, so training and generation would see different tokens.
        """
        if ids[: len(before)] != before:
            raise UserError(
                "The end of a prompt and the beginning of its answer become one token of "
                f"{self.path.parent}, so training and generation would see different tokens; edit the chat template "
                "so that its generation prompt ends with a special token or a newline."
            )

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids. Ids beyond the vocabulary, which a padded model can generate, are ignored."""
        return self.engine.decode([i for i in ids if i < self.vocab_size])
