"""Token ids -> text, token by token, never splitting a UTF-8 character that spans tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

# A character has at most 4 bytes and a token at least one, so what a new token may change lies within 4 tokens; the
# rest is context for decoders that look at the neighbour (a leading space).
WINDOW = 8
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class StreamDecoder:
    """`push` returns what a token adds to the text, or holds it until its last character is complete.

    Pushed texts and the final `flush`, joined, are `decode` of all tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], skip: Collection[int] = ()) -> None:
        self._decode, self._skip = decode, skip
        self._window: list[int] = []
        self._sent = 0  # of the window's text

    def push(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        self._window.append(token_id)
        settled = self._settled()
        added, self._sent = settled[self._sent :], len(settled)
        if len(self._window) >= 2 * WINDOW:  # not with every token: decoding is what takes time here
            del self._window[:-WINDOW]
            self._sent = len(self._settled())
        return added

    def whole(self, token_ids: Sequence[int]) -> str:
        """The text of all tokens at once, of an answer that nobody reads before its end."""
        return self._decode([token for token in token_ids if token not in self._skip])

    def flush(self) -> str:
        """A last character that never was completed."""
        held = self._text()[self._sent :]
        self._window.clear()
        self._sent = 0
        return held

    def _text(self) -> str:
        return self._decode(self._window) if self._window else ""

    def _settled(self) -> str:
        # An unfinished character decodes to one replacement character at the very end. A real one that was generated
        # waits for the next token, too.
        text = self._text()
        return text[:-1] if text.endswith(REPLACEMENT) else text
