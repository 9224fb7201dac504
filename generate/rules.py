"""Access and limits of the server."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """Access and limits.

    Args:
        api_key: clients send it; None lets everybody in.
        admin_token: who adds and removes adapters sends it; None lets nobody do it.
        hosts: names under which the server may be addressed, "*" for any: a page in a browser can give the server's
            address another name, and would then be of the same origin.
        max_body, max_adapter: bytes of a request and of an adapter.
        max_adapters: adapters in the bank.
        max_new_tokens: of an answer.
        seconds: for an answer, waiting included.
        body_seconds: for the body of a request to arrive.
        style: prompt style of all requests; None is each adapter's own.
    """

    api_key: str | None = None
    admin_token: str | None = None
    hosts: tuple[str, ...] = ("*",)
    max_body: int = 2**18
    max_adapter: int = 2**24
    max_adapters: int = 10_000
    max_new_tokens: int = 1024
    seconds: float = 120.0
    body_seconds: float = 10.0
    style: str | None = None
