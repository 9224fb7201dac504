"""The text of an answer that grows token by token."""

from collections.abc import Callable

from lit_llama.tokenizer import Tokenizer

CONTEXT = 8  # prompt tokens decoded with the first tokens, as some tokenizers drop a space at the beginning of a text


class LiveText:
    """For each new token, decodes only the last tokens of an answer, and cuts the text at the first stop text.

    Args:
        prompt: token ids before the answer.
        stop: texts that end the answer; they are not part of it.
        strip: remove whitespace around the answer.

    Attributes:
        text: text of the tokens so far, up to a stop text.
        stopped: whether there was a stop text.
        n_taken: characters of `text` that `take` has returned or skipped.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: list[int], stop: tuple[str, ...] = (), strip: bool = False
    ) -> None:
        self.tokenizer, self.stop, self.strip = tokenizer, stop, strip
        self.text, self.stopped, self.n_taken = "", False, 0
        self.window = prompt[-CONTEXT:]  # the last tokens
        self.n_decoded = len(self.window)  # number of them whose text is complete
        self.before = tokenizer.decode(self.window)  # their text

    def push(self, token: int) -> str:
        """Add a token and return the text that it adds, which is empty while a character is incomplete."""
        self.window.append(token)
        now = self.tokenizer.decode(self.window)
        # after a window without text, SentencePiece would drop the space of the next word
        if now == self.before or now.endswith("\ufffd"):  # no text, or a part of a character
            return ""
        return self._append(now)

    def _append(self, now: str) -> str:
        piece = now[len(self.before) :]
        self.window = self.window[self.n_decoded :]
        self.n_decoded, self.before = len(self.window), self.tokenizer.decode(self.window)
        self.text, self.stopped = cut_at_stop(self.text + piece, self.stop)
        return piece

    def preview(self, token: int) -> str:
        """Return the text that another token would add."""
        return self.tokenizer.decode([*self.window, token])[len(self.before) :]

    def take(self, last: bool = False) -> str:
        """Return the text that has become final since the last call.

        Text that may be the beginning of a stop text is not final, nor is whitespace that may be at the answer's end.

        Args:
            last: the answer ends here.
        """
        if last and not self.stopped and len(self.window) > self.n_decoded:  # an incomplete character
            self._append(self.tokenizer.decode(self.window))
        text, end = self.text, len(self.text)
        if not last:
            end -= max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        if self.strip:
            end = len(text[:end].rstrip())
        piece = text[self.n_taken : end]
        if self.strip and not text[: self.n_taken].strip():
            piece = piece.lstrip()
        self.n_taken = max(self.n_taken, end)
        return piece


def stop_test(tokenizer: Tokenizer, stop: tuple[str, ...]) -> Callable[[list[int]], bool]:
    """Return a function that returns whether the last token of an answer completes a stop text.

    The function takes all token ids of an answer, and decodes only as many of the last ones as the longest stop text
    can span.
    """
    n_last = CONTEXT + 4 * max(map(len, stop), default=0)  # a character can be four byte tokens
    return lambda ids: bool(stop) and cut_at_stop(tokenizer.decode(ids[-n_last:]), stop)[1]


def cut_at_stop(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """Return `text` up to the first stop text, and whether it contains one."""
    ends = [text.find(s) for s in stop if s in text]
    return (text[: min(ends)], True) if ends else (text, False)
