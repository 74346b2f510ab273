"""The text of each token, so that the tokens of an example joined read as its text.

A token is not always a text: byte-level tokenizers cut characters into bytes. Tokens that are parts of a character make
one piece together.
"""

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

BYTE_TOKEN = 6  # characters of "<0xE2>", as sentencepiece writes a byte that is no text


@dataclass(frozen=True)
class Piece:
    """A part of a text, and how many tokens it is."""

    text: str
    num_tokens: int = 1


class PieceReader:
    """Reads token ids as pieces; what an entry of the vocabulary is, is asked once.

    Args:
        tokenizer: of transformers: byte-level BPE, sentencepiece, WordPiece, or any whose `decode` joins texts.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._known: dict[int, Piece | bytes] = {}  # bytes: of a token that is not whole characters
        self._bytes = _bytes_of_characters() if _is_byte_level(tokenizer) else None
        self._special = set(getattr(tokenizer, "added_tokens_decoder", None) or ())

    def read(self, tokens: Sequence[int]) -> list[Piece]:
        """The pieces of a row; their numbers of tokens sum to the row's."""
        pieces: list[Piece] = []
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text, waiting = "", 0  # of tokens that end within a character
        known = self._known
        for token in map(int, tokens):
            part = known.get(token)
            if part is None:
                part = known[token] = self._entry(token)
            if isinstance(part, Piece):
                if waiting:  # for what does not come
                    pieces.append(Piece(text + decoder.decode(b"", final=True), waiting))
                    decoder.reset()
                    text, waiting = "", 0
                pieces.append(part)
                continue
            if waiting == 0 and (whole := _text_of(part)) is not None:
                known[token] = piece = Piece(whole)
                pieces.append(piece)
                continue
            text += decoder.decode(part)
            waiting += 1
            if not decoder.getstate()[0]:
                pieces.append(Piece(text, waiting))
                text, waiting = "", 0
        if waiting:
            pieces.append(Piece(text + decoder.decode(b"", final=True), waiting))
        if self._bytes is None and pieces and pieces[0].text.startswith(" "):
            pieces[0] = Piece(pieces[0].text[1:], pieces[0].num_tokens)  # a word begins with one, a text does not
        return pieces

    def _entry(self, token: int) -> Piece | bytes:
        name = self.tokenizer.convert_ids_to_tokens([token])[0] if token >= 0 else None
        if name is None:  # a model may have more embeddings than its tokenizer has tokens
            return Piece(f"<{token}>")
        if token in self._special:
            return Piece(name)
        if self._bytes is not None:
            if all(character in self._bytes for character in name):
                return bytes(self._bytes[character] for character in name)
            return Piece(name)
        if len(name) == BYTE_TOKEN and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        # After a word, as a tokenizer may leave out the space before the first.
        before, after = (self._decode([*self._a_word, *more]) for more in ([], [token]))
        return Piece(after.removeprefix(before) if after.startswith(before) else self._decode([token]))

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    @cached_property
    def _a_word(self) -> list[int]:
        return list(self.tokenizer("a", add_special_tokens=False)["input_ids"])


def _text_of(part: bytes) -> str | None:
    try:
        return part.decode()
    except UnicodeDecodeError:
        return None


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hasattr(tokenizer, "byte_decoder")
    return '"ByteLevel"' in json.dumps(json.loads(backend.to_str()).get("decoder"))


def _bytes_of_characters() -> dict[str, int]:
    """{character: the byte that byte-level BPE writes with it}: printable ones stand for themselves (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}
