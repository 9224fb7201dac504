"""Access and limits of the server."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """Access and limits.

    Args:
        api_key: key that clients must send; None allows everybody.
        admin_token: token that is needed to add and remove adapters; None allows nobody.
        hosts: host names that requests may use, "*" for any. This prevents DNS rebinding, in which a web page gives the
            server's address another name, so that it counts as the page's own origin.
        max_body, max_adapter: maximum size of a request and of an adapter, in bytes.
        max_adapters: maximum number of adapters in the bank.
        max_new_tokens: maximum number of tokens in an answer.
        seconds: time limit of an answer, including the time in the queue.
        body_seconds: time limit for the body of a request to arrive.
        style: prompt style of all requests; None uses each adapter's own.
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
