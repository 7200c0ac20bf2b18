"""Turns the tokens of a text into pieces of text, each as soon as it is certain."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Ends a decoded text whose last character lacks bytes."""

_CONTEXT = 5
"""Tokens of the prompt that are decoded before the first piece, so that it gets the space before it."""

_MANY = 16
"""Tokens without a certain text after which a part of them is given out. A character has at most four bytes."""

_TOO_MANY = 64
"""Tokens without a certain text after which a part of them is given out even inside of a character."""


class Detokenizer:
    """The end of one text: the tokens of the last piece, and those after it, whose text is not certain yet.

    A token is decoded together with those of the piece before it, because decoders look at both sides of a token's
    edge. If a decoder revises a text that was given out, as it does after bytes that are no UTF-8, the text goes on
    with the new tokens alone. The pieces depend on nothing but the tokens, so replaying them gives the same pieces.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], prompt: Sequence[int] = ()) -> None:
        """`skipped`: special tokens, which have no text. `prompt`: the tokens that the text continues, if any."""
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._before: list[int] = []
        self._prefix = ""
        self._held: list[int] = []
        self._begin_behind([token for token in prompt[-_CONTEXT:] if token not in skipped])

    def step(self, token: int) -> str:
        """Adds a token. Returns the text that became certain, often empty."""
        if token in self._skipped or self._tokenizer.id_to_token(token) is None:
            return ""
        self._held.append(token)
        text = self._decode(self._before + self._held)
        if len(text) <= len(self._prefix) or text.endswith(_UNFINISHED):
            return self._give_out() if len(self._held) >= _MANY else ""
        piece = self._behind(text, self._held)
        self._begin_behind(self._held)
        self._held = []
        return piece

    def tail(self) -> str:
        """Returns the text of the tokens whose text is not certain: unfinished characters. Changes nothing."""
        return self._text_of(self._held) if self._held else ""

    def _give_out(self) -> str:
        """Gives out the text before the last character. So the time of a step does not grow with invalid bytes.

        A cut inside of a character gives more replacement characters than one at its edge, so the cut with the
        shortest text is taken. Tokens that hold parts of two characters may leave no such edge: then it waits.
        """
        held = self._held
        cuts = [
            (self._text_of(held[:at]), self._decode(held[at:]), at) for at in range(len(held) - 1, len(held) - 5, -1)
        ]
        piece, rest, at = min(cuts, key=lambda cut: len(cut[0]) + len(cut[1]))
        if len(piece) + len(rest) > len(self._text_of(held)) and len(held) < _TOO_MANY:
            return ""
        self._begin_behind(held[:at])
        self._held = held[at:]
        return piece

    def _text_of(self, tokens: list[int]) -> str:
        return self._behind(self._decode(self._before + tokens), tokens)

    def _behind(self, text: str, tokens: list[int]) -> str:
        """Returns the part of `text` that belongs to `tokens`, its last ones."""
        return text[len(self._prefix) :] if text.startswith(self._prefix) else self._decode(tokens)

    def _begin_behind(self, tokens: list[int]) -> None:
        self._before = tokens
        self._prefix = self._decode(tokens) if tokens else ""

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)
