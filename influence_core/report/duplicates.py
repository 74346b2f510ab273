"""Which training examples repeat a query: their influence is high for no deeper reason.

Exact: the same tokens. Near: the share of word 5-grams that both have, of those of the text that has fewer (the
containment of Broder 1997, so that a passage inside a longer text is found), from NEAR on.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

NUM_WORDS = 5  # of an n-gram
NEAR = 0.5
_WORD = re.compile(r"\w+")


def describe_duplicate(share: float, is_exact: bool) -> str | None:
    """As the page says it; None for what is no duplicate."""
    if is_exact:
        return "duplicate: the query's own tokens"
    return f"near-duplicate: {share:.0%} of word {NUM_WORDS}-grams shared" if share >= NEAR else None


def same_tokens(one: Mapping[str, Sequence], other: Mapping[str, Sequence]) -> bool:
    """Whether two examples' `token_rows` are the same, and there are any."""
    if not one or one.keys() != other.keys():
        return False
    return all(
        len(one[stream]) == len(other[stream]) and all(np.array_equal(a, b) for a, b in zip(one[stream], other[stream]))
        for stream in one
    )


def shared_words(one: str, other: str) -> float:
    """The share of word n-grams that both texts have, of those of the text with fewer; 0 where one has no words."""
    first, second = word_ngrams(one), word_ngrams(other)
    fewer = min(len(first), len(second))
    return len(first & second) / fewer if fewer else 0.0


@lru_cache(maxsize=4096)
def word_ngrams(text: str) -> frozenset[tuple[str, ...]]:
    """Those of a text, in lower case and without punctuation; all its words where they are too few for one."""
    words = _WORD.findall(text.lower())
    if len(words) < NUM_WORDS:
        return frozenset([tuple(words)] if words else [])
    return frozenset(zip(*(words[start:] for start in range(NUM_WORDS))))
