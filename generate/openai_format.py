"""The server's requests and responses, in the format of OpenAI's API."""

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from generate.jobs import Job, Token
from lit_llama.generation import Sampling
from lit_llama.prompts import PromptStyle
from lit_llama.utils import check_text

MAX_MODEL_LENGTH = 4096  # characters of the name or sum in `model`
MAX_STOPS, MAX_STOP_LENGTH = 16, 256  # stop texts of a request, and their characters
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
# a single text stands for a list of one; a union instead would report an error for each of its members
ListOfOne = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Unused = Annotated[float, Field(ge=0, le=0)]  # an unsupported setting: only its neutral value is accepted


class StreamOptions(BaseModel):
    include_usage: bool = False  # send the numbers of tokens in a last part


class Request(BaseModel):
    """Fields that both kinds of requests share. Other fields are refused rather than ignored, unless they are null."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(max_length=MAX_MODEL_LENGTH)  # an adapter's name, "base", or a sum such as "a:0.5+b"
    temperature: float = Field(1.0, ge=0, le=10)  # 0 is greedy
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)  # not OpenAI's: sample from the k most likely tokens; 0 means all
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)  # of the random numbers (default: a new one each time)
    stop: Annotated[list[Stop], Field(max_length=MAX_STOPS), ListOfOne] | None = None  # texts that end the answer
    max_tokens: int | None = Field(None, ge=1)  # longest answer (default: the server's)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    n: Literal[1] = 1
    frequency_penalty: Unused | None = None
    presence_penalty: Unused | None = None

    @model_validator(mode="before")
    @classmethod
    def without_null(cls, body: Any) -> Any:
        """Drop fields that are null, which clients send for settings that they do not set."""
        return {n: value for n, value in body.items() if value is not None} if isinstance(body, dict) else body

    def sampling(self, max_new_tokens: int, seed: int) -> Sampling:
        """Return how tokens are chosen.

        Args:
            max_new_tokens: the longest answer that the server gives.
            seed: if the request has none.
        """
        length = min(self.wanted_tokens or max_new_tokens, max_new_tokens)
        seed = seed if self.seed is None else self.seed % 2**32  # OpenAI's may be negative
        return Sampling(length, self.temperature, self.top_k, self.top_p, seed)

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Request):
    """The body of POST /v1/completions: texts that the model continues as they are."""

    prompt: Annotated[list[str], Field(min_length=1, max_length=128), ListOfOne]
    logprobs: int | None = Field(None, ge=0, le=20)  # of the tokens, and of this many of the most likely ones
    echo: Literal[False] = False
    best_of: Literal[1] = 1

    @property
    def n_top(self) -> int | None:
        return self.logprobs


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


def in_parts(content: Any) -> Any:
    """Return a content that is a text as a list of one part."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(in_parts)]
    name: str | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class ChatRequest(Request):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: int | None = Field(None, ge=1)  # the new name of max_tokens
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def n_top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def render_messages(messages: Sequence[Message], style: PromptStyle) -> str:
    """Return the prompt of a conversation, see `PromptStyle.render_messages`.

    Raises:
        UserError: The last message is not the user's, one is empty, or the chat template refuses the conversation.
    """
    read = []
    for i, message in enumerate(messages, 1):
        role = "system" if message.role == "developer" else message.role
        fields = {"role": role, "content": check_text(message.text, f"Message {i}")}
        if message.name is not None:
            fields["name"] = check_text(message.name, f"Message {i}: 'name'")
        read.append(fields)
    return style.render_messages(read)


class CompletionFormat:
    """The format of responses of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    @staticmethod
    def choice(index: int, text: str, tokens: Sequence[Token] | None, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": CompletionFormat.logprobs(tokens), "finish_reason": finish}

    @staticmethod
    def part(
        index: int, text: str, tokens: Sequence[Token] | None, finish: str | None, is_first: bool
    ) -> dict[str, Any]:
        return CompletionFormat.choice(index, text, tokens, finish)

    @staticmethod
    def logprobs(tokens: Sequence[Token] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logp for token in tokens],
            "top_logprobs": [dict(reversed(token.top)) for token in tokens],  # of equal texts the most likely one
            "text_offset": [token.start for token in tokens],
        }


class ChatFormat:
    """The format of responses of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    @staticmethod
    def choice(index: int, text: str, tokens: Sequence[Token] | None, finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": index, "message": message, "logprobs": ChatFormat.logprobs(tokens), "finish_reason": finish
        }  # fmt: skip

    @staticmethod
    def part(
        index: int, text: str, tokens: Sequence[Token] | None, finish: str | None, is_first: bool
    ) -> dict[str, Any]:
        delta = ({"role": "assistant"} if is_first else {}) | ({"content": text} if text else {})
        return {"index": index, "delta": delta, "logprobs": ChatFormat.logprobs(tokens), "finish_reason": finish}

    @staticmethod
    def logprobs(tokens: Sequence[Token] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        entries = []
        for token in tokens:
            top = [ChatFormat.entry(text, logp) for text, logp in token.top]
            entries.append({**ChatFormat.entry(token.text, token.logp), "top_logprobs": top})
        return {"content": entries, "refusal": None}

    @staticmethod
    def entry(text: str, logp: float) -> dict[str, Any]:
        is_complete = "\ufffd" not in text  # otherwise it is a part of a character
        return {"token": text, "logprob": max(logp, -9999.0), "bytes": list(text.encode()) if is_complete else None}


Format = type[CompletionFormat] | type[ChatFormat]


def head(format: Format, model: str, is_part: bool) -> dict[str, Any]:
    """Return the fields that all parts of a response share."""
    kind = format.chunk_kind if is_part else format.kind
    return {"id": f"{format.prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def usage(jobs: Sequence[Job]) -> dict[str, int]:
    """Return how many tokens the prompts and answers of a request have, as the API reports them."""
    n_prompt, n_new = sum(len(job.prompt) for job in jobs), sum(job.n_new for job in jobs)
    return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
