"""The tokenizer files of a checkpoint folder: check, copy and convert them."""

import json
import shutil
from pathlib import Path

import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, decoders, models, normalizers, processors

from lit_llama.chat_template import TEMPLATE_NAME
from lit_llama.checkpoint import TOKENIZER_NAME
from lit_llama.storage.files import write_text
from lit_llama.storage.schema import read_json
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError

TOKENIZER_FILES = (TOKENIZER_NAME, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "generation_config.json", TEMPLATE_NAME)  # fmt: skip


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files from one folder to another."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """Return the special tokens under the names that config.json and generation_config.json use."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return {name: i if i >= 0 else None for name, i in ids.items()}


def write_hf_tokenizer(folder: Path, tokenizer: Tokenizer, block_size: int) -> None:
    """Copy a tokenizer's files to a folder in Hugging Face's layout, and add those that transformers also needs.

    Classes of transformers 5 such as LlamaTokenizer and GPT2Tokenizer (SmolLM2) read only the vocabulary and the merges
    of tokenizer.json, and split texts differently. PreTrainedTokenizerFast, which replaces them, reads the
    complete file, as `Tokenizer` does. Its post-processor is rewritten if texts would begin otherwise than with
    `Tokenizer`: transformers 5 ignores `add_bos_token` if there is a tokenizer.json.

    Args:
        folder: Folder to write to.
        tokenizer: The tokenizer.
        block_size: The model's maximum sequence length, in tokens.
    """
    copy_tokenizer(tokenizer.path.parent, folder)
    if not (folder / "generation_config.json").is_file():
        bos_id = tokenizer.engine.stop_ids[-1]  # does not end an answer in other programs, unless it is also EOS
        ends = [i for i in tokenizer.stop_ids if i != bos_id or i == tokenizer.eos_id]
        generation = {**token_ids(tokenizer), "eos_token_id": ends if len(ends) > 1 else tokenizer.eos_id}
        write_text(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    if (folder / "tokenizer.json").is_file() or tokenizer.path.name != TOKENIZER_NAME:
        path = folder / "tokenizer_config.json"
        about = read_json(path) if path.is_file() else {}
        write_text(path, json.dumps({**about, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
        has_bos, chat = tokenizer.bos_id >= 0, tokenizer.chat_engine
        if has_bos != (chat.engine.encode("").ids[:1] == [chat.stop_ids[-1]]):
            engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            bos = engine.id_to_token(tokenizer.bos_id) if has_bos else None
            engine.post_processor = post_processor(bos, tokenizer.bos_id)
            write_text(folder / "tokenizer.json", engine.to_str(pretty=False))
        return
    if engine := as_tokenizer_json(tokenizer.path, tokenizer.bos_id >= 0):
        tokens = tokenizer.engine.control | tokenizer.engine.added
        for text in sorted(tokens, key=tokens.__getitem__):
            add = engine.add_special_tokens if text in tokenizer.engine.control else engine.add_tokens
            add([AddedToken(text, normalized=False)])
        if wrong := [text for text, i in tokens.items() if engine.token_to_id(text) != i]:
            raise UserError(f"{tokenizer.path.parent} adds the token {wrong[0]!r} at an id that leaves a gap.")
        write_text(folder / "tokenizer.json", engine.to_str(pretty=False))
        about = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": block_size,
            "eos_token": engine.id_to_token(tokenizer.eos_id),
            "unk_token": engine.model.unk_token,
            "add_bos_token": tokenizer.bos_id >= 0,
        }
        if tokenizer.bos_id >= 0:
            about["bos_token"] = engine.id_to_token(tokenizer.bos_id)
        if tokenizer.template is not None:
            named = [{"name": name, "template": text} for name, text in tokenizer.template.sources.items()]
            about["chat_template"] = named if len(named) > 1 else tokenizer.template.source
        write_text(folder / "tokenizer_config.json", json.dumps(about, indent=2) + "\n")


def as_tokenizer_json(path: Path, add_bos: bool = True) -> tokenizers.Tokenizer | None:
    """Convert a SentencePiece model of LLaMA's kind for the `tokenizers` library, with the same ids for every text.

    The conversion in transformers omits the space that SentencePiece adds to a text which begins with a space.

    Args:
        path: The `tokenizer.model`.
        add_bos: Whether a text begins with BOS.

    Returns:
        None for models of another kind: not BPE, without byte fallback, or with a normalization of texts.
    """
    spec = ModelProto.FromString(path.read_bytes())
    trained, rules = spec.trainer_spec, spec.normalizer_spec
    supported = trained.model_type == trained.BPE and trained.byte_fallback and rules.add_dummy_prefix
    if not supported or rules.remove_extra_whitespaces or rules.precompiled_charsmap:
        return None
    vocab = {piece.piece: i for i, piece in enumerate(spec.pieces)}
    unknown = next((piece.piece for piece in spec.pieces if piece.type == piece.UNKNOWN), None)
    engine = tokenizers.Tokenizer(
        models.BPE(vocab, _merges(spec), unk_token=unknown, fuse_unk=True, byte_fallback=True, ignore_merges=False)
    )
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [p.piece for p in spec.pieces if p.type in (p.CONTROL, p.UNKNOWN)]
    added = [p.piece for p in spec.pieces if p.type == p.USER_DEFINED]
    engine.add_special_tokens([tokenizers.AddedToken(piece, normalized=False, special=True) for piece in control])
    engine.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in added])
    bos = trained.bos_piece
    if add_bos and trained.bos_id >= 0:
        engine.post_processor = post_processor(bos, vocab[bos])
    return engine


def post_processor(bos: str | None, bos_id: int) -> processors.TemplateProcessing:
    """Return a post-processor that begins texts with BOS, or with nothing if `bos` is None."""
    if bos is None:
        return processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )


def _merges(spec: ModelProto) -> list[tuple[str, str]]:
    """Return the pairs of pieces that form a piece, those of the most likely piece first."""
    scores = {piece.piece: piece.score for piece in spec.pieces if piece.type == piece.NORMAL}
    merges = []
    for text in sorted(scores, key=lambda text: -scores[text]):
        pairs = [(text[:i], text[i:]) for i in range(1, len(text))]
        merges += [(left, right) for left, right in pairs if left in scores and right in scores]
    return merges
