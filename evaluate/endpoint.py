"""Send requests to an OpenAI-compatible chat endpoint: OpenAI, vLLM, llama.cpp's server, Ollama and others."""

import http.client
import json
import re
import socket
import ssl
import urllib.error
import urllib.request
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from lit_llama.storage.schema import check, parse_json
from lit_llama.utils import UserError


class Retry(Exception):
    """A failed attempt that may succeed when it is repeated.

    Args:
        kind: "busy", the endpoint limits the rate of requests; "down", nothing listens at the address; "broken", this
            request got no usable reply.
        wait: seconds that the endpoint asks to wait, if it does.
    """

    def __init__(self, kind: Literal["busy", "down", "broken"], reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.kind, self.wait = kind, wait


class Refused(Exception):
    """The endpoint rejects this request; repeating it would not help."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirects, which would send the API key to another address."""

    def redirect_request(self, *args: Any) -> None:
        return None


class Endpoint:
    """A chat endpoint.

    Args:
        url: its base, such as "http://127.0.0.1:8000/v1", or the address of its chat completions.
        key: sent as a bearer token, if given. It is never shown in messages.
        key_env: the environment variable that the user sets the key in, for messages.
        timeout: seconds to wait for a reply.

    Raises:
        UserError: the URL is not an http(s) address, contains a password or a character to encode, the key cannot be
            sent, or `key_env` is not the name of a variable.
    """

    def __init__(self, url: str, key: str | None = None, key_env: str = "OPENAI_API_KEY", timeout: float = 120) -> None:
        if not key_env.isidentifier():
            raise UserError("--judge_key_env is the name of an environment variable, not the key; set the key there.")
        try:
            parts = urlsplit(url.strip())
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            (parts.hostname or "").encode("idna")  # a part of the name is empty or too long: a UnicodeError
        except ValueError:
            valid = False
        if not valid:
            raise UserError("--judge_url is not an address such as http://127.0.0.1:8000/v1.")
        if parts.username or parts.password:
            raise UserError(f"--judge_url contains a password; set the environment variable {key_env} instead.")
        if re.search("[^!-~]", url.strip()):
            raise UserError("--judge_url contains a space or a character outside ASCII; encode it, such as %20.")
        if key and not (key.isascii() and key.isprintable()):
            raise UserError(f"The environment variable {key_env} is not an API key: it has special characters.")
        path = parts.path.rstrip("/")
        if not path.endswith("/chat/completions"):
            path = (path or "/v1") + "/chat/completions"
        self.address = urlunsplit(parts._replace(path=path, fragment=""))
        self.name = urlunsplit(parts._replace(path=path, query="", fragment=""))  # a query may hold a key
        self.key, self.key_env, self.timeout = key, key_env, timeout
        self.open = urllib.request.build_opener(NoRedirect).open

    def post(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send one request and return the JSON object of the reply.

        Raises:
            Retry: the attempt failed, but may succeed when it is repeated.
            Refused: the endpoint rejects this request.
            UserError: the endpoint rejects all requests: the key, the address or the model is wrong.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.address, json.dumps(body).encode(), headers)
        try:
            with self.open(request, timeout=self.timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            raise self.http_failure(error) from None
        except (OSError, http.client.HTTPException) as error:
            raise self.connection_failure(error) from None
        try:
            reply = parse_json(content, self.name)
            reply_text(reply)
            for value in (reply.get("model"), reply["choices"][0].get("finish_reason")):
                check(value, str | None, self.name)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise Retry("broken", f"the reply is not a chat completion: {self.excerpt(content)}") from None
        return reply

    def connection_failure(self, error: Exception) -> Retry:
        """Return what an error of the connection means."""
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            return Retry("broken", f"no reply within {self.timeout:g} s")
        down = isinstance(reason, ConnectionRefusedError | socket.gaierror | ssl.SSLCertVerificationError)
        text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        return Retry("down" if down else "broken", self.redact(text))

    def http_failure(self, error: urllib.error.HTTPError) -> Exception:
        """Return what an HTTP status means."""
        code = error.code
        try:
            text = self.excerpt(error.read())
        except (OSError, http.client.HTTPException):
            text = error.reason
        moderated = code == 403 and re.search("moderation|flagged", text, re.IGNORECASE)  # as OpenRouter reports it
        if code in (401, 403) and not moderated:  # the text may quote parts of the key
            remedy = "replace the key in" if self.key else "set"
            return UserError(
                f"The judge at {self.name} refused the API key (HTTP {code}); {remedy} the environment variable "
                f"{self.key_env}."
            )
        if code == 404:
            return UserError(f"There is no such endpoint or model at {self.name} (HTTP 404: {text}).")
        if code == 402 or (code == 429 and "insufficient_quota" in text):
            return UserError(f"The account at {self.name} has no credit left (HTTP {code}: {text}).")
        if code in (408, 409, 425, 429) or code >= 500:
            wait = retry_after(error.headers.get("Retry-After"))
            return Retry("busy" if code == 429 else "broken", f"HTTP {code}: {text}", wait)
        return Refused(f"HTTP {code}: {text}")

    def redact(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text

    def excerpt(self, content: bytes) -> str:
        """Return the beginning of a reply for a message, on one line and without the key."""
        return " ".join(self.redact(content.decode("utf-8", "replace")).split())[:200] or "no text"


def reply_text(reply: dict[str, Any]) -> str:
    """Return the text of a chat completion; "" if it has none, for example because a filter removed it.

    Raises:
        LookupError, TypeError, AttributeError: it is not a chat completion.
    """
    message = reply["choices"][0]["message"]
    text = message.get("content") or message.get("refusal") or ""
    if not isinstance(text, str):
        raise TypeError(f"content is {type(text).__name__}")
    return text


def retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks to wait: a number or a date (RFC 9110, section 10.2.3)."""
    try:
        return max(0.0, float(value))
    except (ValueError, TypeError):
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds())
    except (ValueError, TypeError):
        return None
