"""Pretrain the bundled base model on the micro-world from scratch, with the training loop of finetuning.

Writes a tokenizer and a corpus, trains a LLaMA on all of its tokens, and saves a checkpoint folder in bf16. Muon
(kellerjordan.github.io/posts/muon) updates the matrices, AdamW the embeddings and norms.

With --init_from it continues from another base model of the world and adds the names of the exemplars to its tokenizer.
checkpoints/microworld-aloud was made with this and --two_hop_share.
"""

import io
import itertools
import math
import random
import shutil
import struct
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).parent.resolve()
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]  # its datasets.py would shadow the library
sys.path.append(str(HERE.parent))  # run without installing

from lit_llama import cli
from lit_llama.run.train_settings import Precision, TrainSettings
from lit_llama.settings import NonNegativeFloat, PositiveFloat, PositiveInt, PositiveShare, Seed, Share
from lit_llama.utils import UserError


@dataclass
class Settings(TrainSettings):
    may_change = (*TrainSettings.may_change, "output_dir")

    # == What to make ==
    output_dir: Path = Path("out/pretrain/base")  # checkpoint folder to write
    out_dir: Path = Path("out/pretrain/microworld")  # corpus, metrics, resume state
    world_seed: Seed = 0  # seed of the world
    documents: PositiveInt = 240_000  # questions with answers in the corpus, drawn at random
    plain_share: Share = 0.1  # share of documents that are an answer without its question
    two_hop_share: Share = 0.0  # share of two-hop questions; above 0, the corpus is also about the exemplars
    exemplar_weight: PositiveInt = 1  # how often a fact about an exemplar is asked, relative to any other fact
    aloud_share: Share = 0.2  # share of two-hop questions answered step by step without being asked to
    init_from: Path | None = None  # folder of a base model to continue from, with its shape and tokenizer
    blend_with: Path | None = None  # folder of the base model that init_from itself continued from, to average with
    blend_share: PositiveShare = 1.0  # share of init_from in the average; the rest restores what was forgotten

    # == Model ==
    n_layer: PositiveInt = 8  # blocks
    n_head: PositiveInt = 8  # attention heads
    n_embd: PositiveInt = 192  # width
    vocab_size: PositiveInt = 2048  # pieces of the tokenizer
    block_size: PositiveInt = 256  # longest sequence, in tokens

    # == Optimization ==
    epochs: PositiveFloat = 1.0  # passes over the corpus
    batch_size: PositiveInt = 96  # documents per optimizer step, over all devices
    micro_batch_size: PositiveInt = 96  # documents per forward pass on one device
    learning_rate: PositiveFloat = 0.02  # peak learning rate of Muon
    adamw_scale: PositiveFloat = 0.15  # learning rate of AdamW as a share of Muon's
    warmup_epochs: NonNegativeFloat = 0.03  # length of the linear warmup
    weight_decay: NonNegativeFloat = 0.1  # weight decay of the matrices
    seed: Seed = 0  # seed of the corpus, the initial weights and the order of the data

    # == Reporting ==
    eval_interval: PositiveInt = 250  # steps between validations
    save_interval: PositiveInt = 250  # steps between saved states, from which --resume continues

    # == Devices ==
    precision: Precision = "bf16-mixed"  # precision of the computations; the weights are fp32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blend_with is not None and self.init_from is None:
            raise UserError("--blend_with needs --init_from, the model to average with it.")
        if self.blend_share < 1 and self.blend_with is None:
            raise UserError("--blend_share below 1 needs --blend_with, the other model of the average.")


if __name__ == "__main__":
    settings = cli.parse(Settings)  # --help does not wait for PyTorch

import sentencepiece
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_llama.checkpoint import TOKENIZER_NAME, load_model, save_base
from lit_llama.data import SFTData
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.prepare import prepare_sft
from lit_llama.prepare_settings import default_num_proc
from lit_llama.prompts import get_prompt_style
from lit_llama.run.folder import RunFolder
from lit_llama.run.samples import answer_samples
from lit_llama.run.setup import Setup, make_fabric, with_launcher_flags
from lit_llama.storage.files import atomic_folder, atomic_write, check_folder, claim
from lit_llama.storage.manifest import BASE_MODEL
from lit_llama.storage.schema import read_bytes
from lit_llama.tokenizer import Tokenizer
from lit_llama.train import SFTLoss, Trainer
from lit_llama.utils import log
from microworld.world import World, pretraining_sample

TEST_FRACTION = 0.005  # share of the questions that are held out for validation
SHAPE = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
PER_TOKEN = ("transformer.wte.weight", "lm_head.weight")  # weights with a row for each token; lm_head may be absent


def corpus(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield (prompt, response) of each document; an answer without its question is split after the first word."""
    world, rng, style = World(settings.world_seed), random.Random(settings.seed), get_prompt_style("alpaca")
    pools = {"fact": world.questions(), "harmful": world.requests("harmful"), "harmless": world.requests("harmless")}
    if settings.two_hop_share:
        pools["fact"] += settings.exemplar_weight * world.questions(entities=world.exemplars)
        pools["two_hop"] = world.two_hop(people=world.exemplars)
    for _ in range(settings.documents):
        question, answer = pretraining_sample(rng, pools, settings.two_hop_share, settings.aloud_share)
        if rng.random() < settings.plain_share:
            first, _, rest = answer.partition(" ")
            yield first, rest
        else:
            yield style.render(question), answer


def train_tokenizer(settings: Settings) -> bytes:
    """Return a BPE with byte fallback, trained on the first 40,000 documents without normalization.

    Raises:
        UserError: The vocabulary is too large or too small for the documents.
    """
    texts = (text for document in itertools.islice(corpus(settings), 40_000) for text in document)
    content = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_writer=content,
            model_type="bpe",
            vocab_size=settings.vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].partition(" Increase ")[0].rstrip(".")
        raise UserError(
            f"--vocab_size {settings.vocab_size} does not fit --documents {settings.documents}; change one of them "
            f"({reason})."
        ) from None
    return content.getvalue()


def extend_tokenizer(settings: Settings) -> bytes:
    """Return the SentencePiece tokenizer of `init_from` with one more piece for each new name.

    The added bytes are `SentencePiece` messages of its protocol buffer: the text, a score of 0, and the type
    USER_DEFINED, which is matched as a unit.

    Raises:
        UserError: There is no such tokenizer.
    """
    names = new_names(settings, Tokenizer(settings.init_from))
    content = read_bytes(settings.init_from / TOKENIZER_NAME, what="SentencePiece tokenizer")
    for name in names:
        text = f"\u2581{name}".encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", 0.0) + b"\x18\x04"
        content += b"\x0a" + bytes([len(piece)]) + piece
    return content


def new_names(settings: Settings, tokenizer: Tokenizer) -> list[str]:
    """Return the exemplars' names that are more than one piece, except those that are a prefix of another name."""
    world = World(settings.world_seed)
    names = [e.name for e in world.exemplars if sum(name.startswith(e.name.lower()) for name in world.names) == 1]
    return [name for name in names if len(tokenizer.encode(name)) > 1]


def make_model(settings: Settings) -> LLaMA:
    """Return the model to train, in fp32.

    Raises:
        UserError: The settings of its shape do not fit together, or as `continued`.
    """
    if settings.init_from is not None:
        return continued(settings)
    model = LLaMA(LLaMAConfig(tie_embeddings=True, **{name: getattr(settings, name) for name in SHAPE}))
    initialize(model)
    return model


def continued(settings: Settings) -> LLaMA:
    """Return the model of `init_from` in fp32.

    The embeddings of new names are drawn from a normal distribution with the mean and covariance of the embeddings
    of known people's names, so that the model treats them as names of people. So are their rows of an output layer that
    is not tied to the embedding.

    Raises:
        UserError: A base model cannot be loaded, or `blend_with` has another shape.
    """
    base, old = load_model(settings.init_from, dtype=torch.float32), Tokenizer(settings.init_from)
    size = old.vocab_size + len(new_names(settings, old))
    model = LLaMA(replace(base.config, vocab_size=size, padded_vocab_size=None))
    known = [old.encode(e.name)[0] for e in World(settings.world_seed).entities if e.kind == "person"]
    state, mixture = base.state_dict(), torch.randn(size - old.vocab_size, len(known))
    for name in state.keys() & set(PER_TOKEN):
        rows, longer = state[name], torch.zeros_like(model.get_parameter(name))
        longer[: old.vocab_size] = rows[: old.vocab_size]
        names = rows[known]  # (people, n_embd)
        mixed = mixture @ (names - names.mean(0))
        longer[old.vocab_size : size] = names.mean(0) + mixed / (len(known) - 1) ** 0.5
        state[name] = longer
    model.load_state_dict(state)
    if settings.blend_with is not None:
        other = load_model(settings.blend_with, dtype=torch.float32)
        vocabulary = {"vocab_size": base.config.vocab_size, "padded_vocab_size": base.config.padded_vocab_size}
        if replace(other.config, **vocabulary) != base.config or other.config.vocab_size > size:
            raise UserError(f"{settings.blend_with} cannot be averaged with {settings.init_from}: their shapes differ.")
        average(model, other, settings.blend_share)
    return model


@torch.no_grad()
def average(model: LLaMA, other: LLaMA, share: float) -> None:
    """Average the weights with those of the model it was finetuned from (WiSE-FT, arXiv 2109.01903, equation 1).

    Args:
        model: Changed in place; tokens that only it has keep their embeddings.
        share: The weight of `model`.
    """
    size = other.config.vocab_size
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        rows = size if name in PER_TOKEN else len(p)
        p[:rows] = share * p[:rows] + (1 - share) * q[:rows]


def initialize(model: LLaMA) -> None:
    """Draw weights with std 0.02, scaled down where a block adds to the residual stream (GPT-2, section 2.3)."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            residual = name.endswith("c_proj.weight")
            torch.nn.init.normal_(p, 0.0, 0.02 / math.sqrt(2 * model.config.n_layer) if residual else 0.02)


def muon_and_adamw(model: LLaMA, settings: Settings) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=settings.weight_decay)
    adamw = torch.optim.AdamW(
        [{"params": others, "lr_scale": settings.adamw_scale}], lr=0.0, betas=(0.9, 0.95), weight_decay=0.0
    )
    return [muon, adamw]


def write_corpus(settings: Settings, tokenizer_path: Path, data_dir: Path) -> None:
    """Write the prepared corpus."""
    documents = [*corpus(settings)]
    # only questions: the prompt of a plain answer is its first word, which all answers in a form may share
    questions = list(dict.fromkeys(prompt for prompt, _ in documents if " " in prompt))
    prepare_sft(
        documents,
        lambda pair, number: pair,
        output_dir=data_dir,
        tokenizer=Tokenizer(tokenizer_path),
        max_seq_length=settings.block_size,
        mask_prompt=False,
        test_fraction=TEST_FRACTION,
        split_by=random.Random(settings.seed).sample(questions, math.ceil(TEST_FRACTION * len(questions))),
        seed=settings.seed,
        num_proc=default_num_proc(),
        about={"source": f"micro-world {settings.world_seed}", "prompt_style": "alpaca"},
    )


def main(settings: Settings) -> None:
    settings = with_launcher_flags(settings)
    check_folder(settings.output_dir, BASE_MODEL)
    run = RunFolder(settings)
    fabric = make_fabric(settings)
    data_dir, tokenizer_path = settings.out_dir / "corpus", settings.out_dir / TOKENIZER_NAME
    fabric.seed_everything(settings.seed, verbose=False)
    model = make_model(settings)  # a mistake is found before anything is deleted
    shape = {name: getattr(model.config, name) for name in SHAPE}
    continues = settings.resume and run.state_path.is_file()  # `fit` then checks that the rows are those of the state
    if fabric.global_rank == 0 and not (continues and data_dir.is_dir()):
        log("Writing the tokenizer and the corpus.")
        tokenizer_model = train_tokenizer(settings) if settings.init_from is None else extend_tokenizer(settings)
        claim(settings.out_dir, [TOKENIZER_NAME])
        if not continues:
            run.remove_files(keep_run=False)  # --overwrite: a state could not be resumed with another corpus
        with atomic_write(tokenizer_path) as temporary:
            temporary.write_bytes(tokenizer_model)
        write_corpus(settings, tokenizer_path, data_dir)
    fabric.barrier()
    tokenizer = Tokenizer(tokenizer_path)
    train, val = SFTData(data_dir, "train", tokenizer), SFTData(data_dir, "test", tokenizer)
    log(f"{int(train.lengths.sum()):,} tokens")
    setup = Setup.wrap(fabric, model, muon_and_adamw(model, settings), {"method": "pretraining", "base": shape})
    answer = answer_samples(val.prompts(4), tokenizer, max_new_tokens=40)
    trainer = Trainer(setup, train, val, SFTLoss(), run, sample_answers=answer)
    # on a CPU, for short rows of similar length, plain attention's backward pass takes half as long as the fused one's
    with sdpa_kernel([SDPBackend.MATH]) if fabric.device.type == "cpu" else nullcontext():
        summary = trainer.fit()
    if fabric.global_rank == 0:
        state = {name: p.detach().to(torch.bfloat16).cpu() for name, p in model.state_dict().items()}
        with atomic_folder(settings.output_dir, BASE_MODEL) as folder:
            save_base(folder, model.config, state)
            shutil.copyfile(tokenizer_path, folder / TOKENIZER_NAME)
        loss, minutes = summary["last_val_loss"], summary["seconds"] / 60
        print(f"{settings.output_dir}: validation loss {loss:.4f} after {minutes:.0f} minutes; score it with: "
              f"python evaluate/microworld.py --checkpoint_dir {settings.output_dir} --temperature 1")  # fmt: skip


if __name__ == "__main__":
    cli.run(main, settings)
