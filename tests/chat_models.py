"""Checkpoint folders of instruct models: tokenizers, and chat templates in the style of published ones."""

import json
import shutil
from datetime import date, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from evaluate import common
from lit_llama import sandbox
from lit_llama.checkpoint import TOKENIZER_NAME
from lit_llama.huggingface.tokenizer_files import as_tokenizer_json

# {% generation %} tags mark the text of the assistant, for the assistant mask of transformers
LLAMA3 = """{{- bos_token }}
{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + strftime_now("%d %b %Y") + "\\n\\n" }}
{%- if tools is not none %}
    {{- "Functions: " + tools | tojson(indent=2) + "\\n\\n" }}
{%- endif %}
{{- system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message["role"] not in ["user", "assistant", "tool"] %}
        {{- raise_exception("Unknown role: " + message["role"]) }}
    {%- endif %}
    {{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\\n\\n" }}
    {%- if message["role"] == "assistant" %}
        {%- generation %}{{ message["content"] | trim }}{{ "<|eot_id|>" }}{%- endgeneration %}
    {%- else %}
        {{- message["content"] | trim + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}"""

CHATML = """{% for message in messages %}
{% if loop.first and message["role"] != "system" %}
{{ "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n" }}
{%- endif %}
{{- "<|im_start|>" + message["role"] + "\\n" }}
{%- if message["role"] == "assistant" -%}
{% generation %}{{ message["content"] + "<|im_end|>" }}{% endgeneration %}{{- "\\n" }}
{%- else -%}
{{ message["content"] + "<|im_end|>" + "\\n" }}
{%- endif %}
{%- endfor %}
{% if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""

# this template keeps the reasoning of the last answer only
THINKING = """{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set thought = "" %}
        {%- set content = message.content %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif "</think>" in content %}
            {%- set thought = content.split("</think>")[0].rstrip("\\n").split("<think>")[-1].lstrip("\\n") %}
            {%- set content = content.split("</think>")[-1].lstrip("\\n") %}
        {%- endif %}
        {{- "<|im_start|>assistant\\n" }}
        {%- if loop.index0 > ns.last %}
            {{- "<think>\\n" + thought.strip("\\n") + "\\n</think>\\n\\n" }}
        {%- endif %}
        {{- content + "<|im_end|>\\n" }}
        {%- continue %}
    {%- endif %}
    {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- "<think>\\n\\n</think>\\n\\n" }}{%- endif %}
{%- endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
{{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
{%- endif %}
{%- if message["role"] == "user" %}
{{- "[INST] " + message["content"] + " [/INST]" }}
{%- elif message["role"] == "assistant" -%}
{% generation %}{{ " " + message["content"] + eos_token }}{% endgeneration %}
{%- else %}
{{- raise_exception("Only user and assistant roles are supported!") }}
{%- endif %}
{%- endfor %}"""

GEMMA = """{{ bos_token }}{% if messages[0]["role"] == "system" %}{{ raise_exception("System role not supported") }}
{%- endif %}{% for message in messages %}
{%- set role = "model" if message["role"] == "assistant" else message["role"] %}
{{- "<start_of_turn>" + role + "\\n" }}
{%- if role == "model" -%}
{% generation %}{{ message["content"] | trim + "<end_of_turn>" }}{% endgeneration %}{{ "\\n" }}
{%- else %}
{{- message["content"] | trim + "<end_of_turn>\\n" }}
{%- endif %}
{%- endfor %}{% if add_generation_prompt %}{{ "<start_of_turn>model\\n" }}{% endif %}"""

SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "thinking": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "mistral": [],
}
TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML, "thinking": THINKING, "mistral": MISTRAL, "gemma": GEMMA}
# templates with the generation tag, which transformers supports and other programs may not
GENERATED = [name for name, source in TEMPLATES.items() if "generation %}" in source]
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
TEXTS = [
    "the cat sat on the mat and the dog ate the hat",
    "Hello! How are you today?\n\nFine, thanks.",
    "a < b > c | d",
]


def byte_level(special: list[str], added: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    engine = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.Sequence([split, level]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    engine.train_from_iterator(
        TEXTS * 5, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    engine.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    engine.add_tokens([AddedToken(text, normalized=False) for text in added])
    return engine


def metaspace(special: list[str], first_only: bool) -> tokenizers.Tokenizer:
    """Return a LLaMA-style tokenizer that adds a space before the first word of the text, or of each piece."""
    engine = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    scheme = "first" if first_only else "always"
    engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    alphabet = sorted(set("".join(TEXTS)) | set("▁[]/_:.INSTthecat"))
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)]]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False, max_token_length=8
    )
    engine.train_from_iterator([*TEXTS, "[INST] the cat [/INST] sat", "user model\n"] * 5, trainer)
    # the byte tokens are ordinary, not special
    state = json.loads(engine.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    engine = tokenizers.Tokenizer.from_str(json.dumps(state))
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    engine.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    bos = engine.token_to_id("<s>")
    engine.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return engine


def write_model(folder: Path, kind: str, tokenizer_path: Path | None = None, **about: Any) -> Path:
    """Write the tokenizer files of an instruct model.

    Args:
        kind: A key of `TEMPLATES`, or "mistral-first", whose tokenizer adds a space before the first word only.
        tokenizer_path: The `tokenizer.model` from which the tokenizer.json of Mistral and Gemma is made.
        about: Additional entries of tokenizer_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = kind.partition("-")[0]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if name in ("llama3", "chatml", "thinking"):
        engine = byte_level(SPECIAL[name], ("<think>", "</think>") if name == "thinking" else ())
        config["eos_token"] = SPECIAL[name][-1]
        if name == "llama3":
            config["bos_token"] = SPECIAL[name][0]
    else:
        if kind.endswith("-first"):
            engine = metaspace(SPECIAL[name], first_only=True)
        else:
            engine = as_tokenizer_json(tokenizer_path)
            engine.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL[name]])
        config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        if tokenizer_path is not None and not kind.endswith("-first") and not SPECIAL[name]:
            shutil.copy(tokenizer_path, folder / TOKENIZER_NAME)
    engine.save(str(folder / "tokenizer.json"))
    config |= {"chat_template": TEMPLATES[name], **about}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_dated(base_dir: Path, folder: Path) -> Path:
    """Copy a base model and give it a chat template that begins with the date."""
    shutil.copytree(base_dir, folder)
    template = '{{ strftime_now("%d %b %Y") }}: {% for message in messages %}{{ message.content }}{% endfor %}'
    (folder / "chat_template.jinja").write_text(template)
    return folder


def set_today(monkeypatch: Any, day: date) -> None:
    """Set the date of templates and of evaluations."""

    class Today(date):
        @classmethod
        def today(cls) -> date:
            return day

    monkeypatch.setattr(common, "date", Today)
    monkeypatch.setattr(sandbox, "datetime", SimpleNamespace(now=lambda: datetime(day.year, day.month, day.day)))


def normalizer_of(path: Path) -> normalizers.Normalizer:
    return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).normalizer
