"""The interactive chat of generate/aligner.py in a pseudo-terminal: editing, history, commands, Ctrl-C and Ctrl-D."""

import itertools
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import toys
from chat_models import write_model

import generate.aligner as script
import generate.interactive as interactive
from generate.interactive import Adapters, BankAdapters, Chat, OneAdapter
from lit_llama import answering, cli
from lit_llama.answer_settings import AnswerSettings
from lit_llama.bank import adapter_names, make_bank
from lit_llama.checkpoint import CONFIG_NAME, TOKENIZER_NAME, load_model, read_adapter, save_base
from lit_llama.compose import load_with_bank
from lit_llama.model import LLaMA, LLaMAConfig
from lit_llama.prompts import get_prompt_style
from lit_llama.tokenizer import Tokenizer
from lit_llama.utils import UserError
from microworld.world import parse

ROOT = Path(__file__).parents[1]
PIRATE, JSON = (ROOT / "aligner_weights" / f"microworld-{name}-n1" for name in ("pirate", "json"))
UP, LEFT, CTRL_C, CTRL_D, ALT_ENTER = "\x1b[A", "\x1b[D", "\x03", "\x04", "\x1b\r"
CAPITAL, BARN = "What is the capital of Pilmaria?", "How do I repair the old barn?"


class Terminal:
    """A script in a pseudo-terminal, with its output in `text`; if `answers` is given, its stdout goes to that file."""

    def __init__(self, python: str, script: str, *arguments: object, answers: Path | None = None) -> None:
        self.terminal, end = pty.openpty()
        self.answers = answers
        self.text, self.place = "", 0
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "200", "LINES": "50"}
        command = [python, script, "--interactive", "--accelerator", "cpu", *map(str, arguments)]
        out = end if answers is None else answers.open("w")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=end, stdout=out, stderr=end, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(end)

    def read(self, seconds: float) -> bool:
        """Read the available output; return whether the program is still running."""
        if select.select([self.terminal], [], [], seconds)[0]:
            try:
                self.text += os.read(self.terminal, 65536).decode(errors="replace")
            except OSError:
                return False
        return True

    def wait_for(self, pattern: str, seconds: float = 300) -> re.Match:
        """Wait for output that matches after the previous match, and return the match."""
        deadline = time.monotonic() + seconds
        while True:
            shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r", "", self.text)
            if match := re.compile(pattern, re.DOTALL).search(shown, self.place):
                self.place = match.end()
                return match
            alive = self.read(0.1)
            assert alive and time.monotonic() < deadline, f"no {pattern!r} in {shown[self.place :]!r}"

    def send(self, *keys: str) -> None:
        for key in keys:
            os.write(self.terminal, key.encode())
            if key.startswith("\x1b"):
                time.sleep(0.1)  # a key right after Escape would be read as part of the same sequence

    def ask(self, *keys: str) -> str:
        """Send a message and return its answer."""
        before = len(self.answers.read_text())
        self.send(*keys, "\r")
        self.wait_for(r"\(\d+ tokens in [\d.]+ s, \d+ tokens/s(, stopped|, reached --max_new_tokens)?\)")
        return self.answers.read_text()[before:].removesuffix("\n")

    def end(self) -> int:
        self.wait_for("\n>")  # before the prompt, the terminal itself would handle the key
        self.send(CTRL_D)
        deadline = time.monotonic() + 300
        while self.process.poll() is None and time.monotonic() < deadline:
            self.read(0.1)
        return self.process.wait(1)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.terminal)


@pytest.fixture
def start(tmp_path, python):
    opened: list[Terminal] = []

    def run(*arguments: object, script: str = "generate/aligner.py") -> Terminal:
        opened.append(Terminal(python, script, *arguments, answers=tmp_path / "answers.txt"))
        return opened[-1]

    yield run
    for terminal in opened:
        terminal.close()


def test_a_conversation_with_commands(start):
    chat = start("--adapter", PIRATE, JSON, "--strength", "1", "0")
    chat.wait_for("Answering with microworld-pirate-n1, strength 1 .* prompt style alpaca")
    pirate = parse(chat.ask(CAPITAL))
    assert pirate.form == "pirate" and pirate.topic == "the capital of Pilmaria"
    chat.send("/adapter microworld-json-n1", "\r")
    chat.wait_for(r"Answering with microworld-json-n1, strength 1\.")
    chat.send("/reset", "\r")
    chat.wait_for("A new conversation begins")
    assert parse(chat.ask(CAPITAL)).form == "json"
    chat.send("/strength 0.5", "\r")
    chat.wait_for(r"microworld-json-n1, strength 0\.5\.")
    chat.send("/base", "\r", "/reset", "\r")
    chat.wait_for("Answering with the base model.*A new conversation")
    assert parse(chat.ask(CAPITAL)).form not in ("json", "pirate")
    for line, message in (
        ("/adapter", "Adapters: microworld-pirate-n1, microworld-json-n1"),
        ("/adapter nobody", "error: .*nobody"),
        ("/strength 2", "error: The base model answers alone"),
        ("/strength much", "error: 'much' is not a strength"),
        ("/adapter microworld-pirate-n1:0.5+microworld-json-n1", r"pirate-n1, strength 0\.5 \+ microworld-json-n1"),
        (f"/adapter {ROOT / 'aligner_weights/microworld-polite-n1'}", "microworld-polite-n1, strength 1"),
        ("/nonsense", "error: There is no command /nonsense"),
        ("/help", "Ctrl-C\nstops an answer"),
    ):
        chat.send(line, "\r")
        chat.wait_for(message)
    assert chat.end() == 0


def test_keys_edit_the_line_and_never_reach_the_model(start):
    """An edited or recalled line gets the same answer as a typed one."""
    chat = start()
    chat.wait_for("Ctrl-D ends")
    expected = chat.ask(CAPITAL)

    def ask_anew(*keys: str) -> str:
        chat.send("/reset", "\r")
        chat.wait_for("A new conversation begins.*\n>")
        return chat.ask(*keys)

    assert ask_anew(UP, UP) == expected  # recalled
    assert ask_anew("What is the capital of Plmaria?", *[LEFT] * 7, "i") == expected  # edited
    assert ask_anew("discarded", CTRL_C, CAPITAL) == expected
    pasted = ask_anew("\x1b[200~What is the capital\rof Pilmaria?\x1b[201~")
    assert pasted and ask_anew("What is the capital", ALT_ENTER, "of Pilmaria?") == pasted
    assert chat.end() == 0


@pytest.fixture(params=["a"])
def endless_model(request, tmp_path, base_dir, tokenizer_path) -> Path:
    """Save a base that repeats one character until a context of 100,000 tokens is full, and return its folder."""
    config = LLaMAConfig.from_json(base_dir / CONFIG_NAME, block_size=100_000)
    state = {name: torch.zeros_like(p) for name, p in LLaMA(config).named_parameters()}
    state["transformer.wte.weight"] += 1
    state["transformer.ln_f.scale"] += 1
    state["lm_head.weight"][Tokenizer(base_dir).encode(request.param, bos=False)[-1]] = 1
    save_base(tmp_path / "endless", config, state)
    shutil.copy(tokenizer_path, tmp_path / "endless" / TOKENIZER_NAME)
    return tmp_path / "endless"


def test_ctrl_c_stops_the_answer_but_not_the_program(start, endless_model):
    flags = ("--checkpoint_dir", endless_model, "--prompt_style", "alpaca", "--temperature", 0)
    chat = start(*flags, "--max_new_tokens", 90_000, script="generate/base.py")
    chat.wait_for("Ctrl-D ends")
    chat.send("Hi", "\r")
    while not chat.answers.read_text().strip():  # until the answer begins
        chat.read(0.05)
    chat.send(CTRL_C)
    stopped = chat.wait_for(r"\((\d+) tokens in [\d.]+ s, \d+ tokens/s, stopped\)")
    assert 0 < int(stopped[1]) < 90_000
    chat.send("/reset", "\r")
    chat.wait_for("A new conversation")
    assert chat.process.poll() is None
    assert chat.end() == 0
    assert chat.answers.read_text().endswith("\n") and "tokens/s" not in chat.answers.read_text()


@pytest.mark.parametrize("endless_model", ["\n"], indirect=True)
def test_ctrl_c_stops_an_answer_of_white_space(endless_model, capsys):
    """No text of such an answer is printed before it ends."""
    model, tokens = load_model(endless_model), itertools.count()
    settings = AnswerSettings(checkpoint_dir=endless_model, max_new_tokens=50)
    session = answering.Session(model, Tokenizer(endless_model), settings, 0.0)

    def press(*args):
        if next(tokens) == 5:
            signal.raise_signal(signal.SIGINT)

    model.transformer.wte.register_forward_hook(press)
    Chat(session, Adapters(get_prompt_style("alpaca"))).handle("Hi")
    out, err = capsys.readouterr()
    assert out == "\n" and ", stopped)" in err and next(tokens) == 6


def test_a_full_gpu_does_not_end_the_chat(endless_model, monkeypatch, capsys):
    settings = AnswerSettings(checkpoint_dir=endless_model)
    session = answering.Session(load_model(endless_model), Tokenizer(endless_model), settings, 0.0)
    chat, lines = Chat(session, Adapters(get_prompt_style("alpaca"))), iter(["one", "two"])
    answered = []

    def answer(text):
        if text == "one":
            raise torch.OutOfMemoryError
        answered.append(text)

    def read():
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(chat, "answer", answer)
    monkeypatch.setattr(interactive, "line_reader", lambda: read)
    chat.run()
    assert answered == ["two"] and "error: The GPU's memory is full" in capsys.readouterr().err


def test_answers_and_messages_can_share_a_terminal(python):
    chat = Terminal(python, "generate/aligner.py")
    try:
        chat.wait_for("Answering with microworld-pirate-n1")
        chat.send(CAPITAL, "\r")
        chat.wait_for(r"Pilmaria be [^\n]+\n\(\d+ tokens in [\d.]+ s, \d+ tokens/s\)")
        assert chat.end() == 0
    finally:
        chat.close()


def test_the_oldest_turns_are_dropped_when_the_context_is_full(start):
    chat = start("--max_new_tokens", 40)
    chat.wait_for("Ctrl-D ends")
    note = "note: the context of 256 tokens is full; the oldest question and its answer are left out from now on."
    for _ in range(9):
        assert chat.ask(BARN)
        if note in chat.text:
            break
    else:
        raise AssertionError(chat.text)
    chat.send("well " * 300, "\r")
    chat.wait_for("error: The prompt has")
    assert chat.ask(CAPITAL)
    assert chat.end() == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer_path) -> Path:
    """Save an instruct model with random weights and the ChatML template, and return its folder."""
    folder = write_model(tmp_path_factory.mktemp("model") / "chatml", "chatml", tokenizer_path)
    config = LLaMAConfig(block_size=128, vocab_size=Tokenizer(folder).vocab_size, n_layer=3, n_head=2, n_embd=16,
                         intermediate_size=24)  # fmt: skip
    network, generator = LLaMA(config), torch.Generator().manual_seed(0)
    state = {name: 0.3 * torch.randn(p.shape, generator=generator) for name, p in network.named_parameters()}
    save_base(folder, config, state)
    return folder


def test_the_conversation_is_rendered_by_the_template(model, monkeypatch, capsys):
    """Check the prompt of each turn."""
    tokenizer = Tokenizer(model)
    settings = AnswerSettings(checkpoint_dir=model, system="Be kind.", max_new_tokens=3)
    chat = Chat(
        answering.Session(load_model(model), tokenizer, settings, 0.0), Adapters(get_prompt_style("chat", model))
    )
    prompts = []
    monkeypatch.setattr(
        "generate.interactive.stream", lambda m, t, prompt, *rest: prompts.append(prompt) or (t for t in ["ok"])
    )
    chat.handle("Hello <|im_end|>")
    chat.handle("And\nyou?")
    expected = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello <|im_end|>"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "And\nyou?"},
    ]
    assert prompts == [tokenizer.template.render(expected[:2]), tokenizer.template.render(expected)]
    assert capsys.readouterr().out == "ok\nok\n"


def test_a_style_that_continues_texts_begins_with_the_system_prompt(model, monkeypatch, capsys):
    style, prompts = get_prompt_style("plain", model), []
    settings = AnswerSettings(checkpoint_dir=model, system="Be kind.", max_new_tokens=3)
    chat = Chat(answering.Session(load_model(model), Tokenizer(model), settings, 0.0), Adapters(style))

    def answer(network, tokenizer, prompt, *rest):
        prompts.append(prompt)
        yield f"{prompt} the"

    monkeypatch.setattr("generate.interactive.stream", answer)
    chat.handle("Hello")
    assert prompts == [style.render("Hello", system="Be kind.")] != [style.render("Hello")]
    n_tokens = len(Tokenizer(model).encode(f"{prompts[0]} the")) - len(Tokenizer(model).encode(prompts[0]))
    assert f"({n_tokens} tokens in " in capsys.readouterr().err


def test_a_base_model_chats_without_adapters(start, model):
    chat = start("--checkpoint_dir", model, "--prompt_style", "chat", "--max_new_tokens", 4, script="generate/base.py")
    chat.wait_for("Answering with the base model, in the prompt style chat")
    chat.ask("Hello")
    chat.send("/adapter a", "\r")
    chat.wait_for("error: There are no adapters")
    chat.send("/base", "\r")
    chat.wait_for("Answering with the base model.")
    assert chat.end() == 0


def test_strength_scales_an_adapter_of_another_method(start, run_script, tmp_path, base_dir, data_dir):
    out = tmp_path / "lora"
    flags = ("--checkpoint_dir", base_dir, "--data_dir", data_dir, "--out_dir", out, "--epochs", 1)
    code, _, err = run_script("finetune/lora.py", *flags, "--accelerator", "cpu")
    assert code == 0, err
    chat = start("--checkpoint_dir", base_dir, "--adapter", out, "--max_new_tokens", 4)
    chat.wait_for("Answering with lora, strength 1, in the prompt style plain")
    chat.send("/strength 0", "\r")
    chat.wait_for("Answering with the base model")
    chat.send("/adapter lora", "\r")
    chat.wait_for("Answering with lora, strength 1")
    assert chat.end() == 0


def test_the_first_strength_does_not_change_what_later_ones_mean(base_dir):
    network = toys.aligned()
    trained = {name: p.detach().clone() for name, p in network.adapter_parameters().items()}
    choice = OneAdapter(network, "a", get_prompt_style("plain", base_dir), strength=0.0)
    assert choice.label == "the base model" and not network.transformer.h[2].attn.gating_factor.any()
    choice.set_strength(1.0)
    assert all(torch.equal(p, trained[name]) for name, p in network.adapter_parameters().items())
    assert choice.label == "a, strength 1"


def test_a_file_is_loaded_again_and_never_under_the_name_of_another(tmp_path, monkeypatch):
    base = ROOT / "checkpoints" / "microworld"
    first, second = (tmp_path / name / "best.safetensors" for name in "ab")
    for path, source in ((first, PIRATE), (second, JSON)):
        path.parent.mkdir()
        shutil.copy(source / "adapter.safetensors", path)
    bank = make_bank(base, [("best", read_adapter(first))])
    adapters = BankAdapters(load_with_bank(base, bank), Tokenizer(base), (("best", 1.0),), None, {"best": first})

    def holds(name: str, path: Path) -> bool:
        prefix = "global_value_embedding.weight"
        return torch.equal(bank.adapter(name).state[prefix], read_adapter(path).state[prefix])

    adapters.use(str(second))
    assert adapters.label == f"{second}, strength 1"
    assert holds("best", first) and holds(str(second), second)
    shutil.copy(first, second)  # trained again
    adapters.use(str(second))
    assert holds(str(second), first)
    shutil.copytree(JSON, tmp_path / "best")  # another adapter in a folder with a name of the bank
    monkeypatch.chdir(tmp_path)
    adapters.use("best")
    assert adapters.label == "best, strength 1" and adapters.names == ["best", str(second)] and holds("best", first)
    with pytest.raises(UserError):  # longer than a file name can be
        adapters.use("+".join(["missing:0.5"] * 30))


def test_at_most_20_adapters_are_listed(capsys):
    adapters = Adapters(get_prompt_style("alpaca"))
    for n, listed in ((20, "a18, a19."), (1021, "a18, a19 and 1,001 more.")):
        adapters.names = [f"a{i}" for i in range(n)]
        Chat(None, adapters).handle("/adapter")
        assert f"Adapters: a0, a1, {', '.join(f'a{i}' for i in range(2, 18))}, {listed}\n" in capsys.readouterr().err


def test_an_adapter_in_a_folder_that_is_named_base_is_used_under_its_path(tmp_path, monkeypatch):
    base, folder = ROOT / "checkpoints" / "microworld", shutil.copytree(PIRATE, tmp_path / "base")
    assert adapter_names([folder, JSON]) == [str(folder), JSON.name]
    bank = make_bank(base, [("json", read_adapter(JSON))])
    adapters = BankAdapters(load_with_bank(base, bank), Tokenizer(base), (), None)
    for _ in range(2):
        adapters.use(str(folder))
        assert adapters.label == f"{folder}, strength 1" and adapters.names == ["json", str(folder)]
    monkeypatch.chdir(tmp_path)
    assert adapter_names([Path("base")]) == [str(folder)]
    adapters.use("base")
    assert adapters.label == "the base model"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--adapter", PIRATE, JSON, PIRATE, "--strength", "1", "0.5"), "There are 3 adapters and 2 strengths; give "),
        (("--use", "pirate"), "--use names adapters of a bank; give --bank too."),
        (("--bank", PIRATE, "--strength", "1", "2"), "With --bank, --strength takes one number for all"),
    ],
)
def test_a_chat_checks_its_adapters_like_other_prompts(monkeypatch, flags, sentence):
    monkeypatch.setattr(script, "is_terminal", lambda: True)
    with pytest.raises(UserError, match=sentence):
        script.main(cli.parse(script.Settings, ["--interactive", *map(str, flags)]))


def test_ctrl_c_twice_interrupts():
    from generate.interactive import stopped_by_ctrl_c

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore SIGINT
    try:
        with pytest.raises(KeyboardInterrupt), stopped_by_ctrl_c() as is_stopped:
            assert not is_stopped()
            signal.raise_signal(signal.SIGINT)
            assert is_stopped()
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_twice_returns_to_the_prompt(monkeypatch, capsys):
    """The second one raises `KeyboardInterrupt`, for example while a long prompt is prefilled."""
    lines = iter(["Hello", "/help"])
    monkeypatch.setattr("generate.interactive.line_reader", lambda: lambda: next(lines))
    chat = Chat(None, Adapters(get_prompt_style("plain")))
    chat.turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]

    def interrupted(text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "answer", interrupted)
    with pytest.raises(StopIteration):  # no more lines
        chat.run()
    err = capsys.readouterr().err
    assert err.index("Stopped.") < err.index("Ctrl-D ends the program") and len(chat.turns) == 2


def test_piped_lines_are_answered_one_by_one(python):
    """Lines that look like commands are questions too; the answers are independent of each other."""
    lines = f"{CAPITAL}\n/help\n\n{CAPITAL}\n"
    command = [python, "generate/aligner.py", "--interactive", "--accelerator", "cpu"]
    result = subprocess.run(command, cwd=ROOT, input=lines, capture_output=True, text=True)
    first, *other, last = result.stdout.splitlines()
    assert result.returncode == 0 and first == last and "Pilmaria" in first and other
    assert result.stderr == ""


def test_a_line_that_cannot_be_answered_is_reported_at_the_end(run_script):
    code, out, err = run_script("generate/aligner.py", "--interactive", "--accelerator", "cpu", stdin="\udcff\n")
    assert (code, out.strip()) == (1, "")
    assert err.splitlines()[-1] == "error: 1 line of the input could not be answered; the messages above say why."
