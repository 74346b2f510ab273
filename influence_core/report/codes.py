"""Numbers as short text, for a page that holds a million of them; page.js reads them again.

Values are kept relative to the strongest one, as the sign and the square root of their share, in 198 steps, three of
them in four characters: exact to 0.5 % near the strongest, to 2 % at a tenth of it, to 5 % at a hundredth. Lengths of
tokens are digits below 19, three of them in two characters.
"""

from collections.abc import Sequence

import numpy as np

# What neither JSON in a page nor HTML has to escape.
ALPHABET = "".join(chr(code) for code in range(32, 127) if chr(code) not in "\"\\<>&'")
BASE = len(ALPHABET)
STEPS = 198  # on either side of zero: three values make a number below BASE ** 4
LONG = 18  # a length is so much, and more to come
AT_ONCE = 3
VALUE_BYTES, LENGTH_BYTES = 4 / AT_ONCE, 2 / AT_ONCE
_LETTERS = np.frombuffer(ALPHABET.encode(), dtype=np.uint8)


def encode_values(values: np.ndarray) -> list:
    """[strongest magnitude, codes] of numbers; [0, ""] where all are zero."""
    strongest = float(np.abs(values).max(initial=0.0))
    if not strongest:
        return [0, ""]
    shares = np.asarray(values, dtype=np.float64) / strongest
    steps = np.rint(STEPS * np.sign(shares) * np.sqrt(np.abs(shares))).astype(np.int64) + STEPS
    return [rounded(strongest), _packed(steps, 2 * STEPS + 1, 4)]


def decode_values(coded: list, count: int) -> np.ndarray:
    """The numbers again, as page.js reads them."""
    strongest, codes = coded
    if not codes:
        return np.zeros(count)
    steps = _unpacked(codes, 2 * STEPS + 1, 4)[:count] - STEPS
    return strongest * np.sign(steps) * (steps / STEPS) ** 2


def encode_lengths(lengths: Sequence[int]) -> str:
    """Each as digits that sum to it, the last of them less than LONG; LONGs that follow the last are nothing."""
    digits = [digit for length in lengths for digit in (*[LONG] * (length // LONG), length % LONG)]
    return _packed(np.array(digits, dtype=np.int64), LONG + 1, 2, filler=LONG)


def decode_lengths(codes: str) -> list[int]:
    """The lengths again, as page.js reads them."""
    lengths, longer = [], 0
    for digit in _unpacked(codes, LONG + 1, 2).tolist():
        longer += digit
        if digit < LONG:
            lengths.append(longer)
            longer = 0
    return lengths


def _packed(digits: np.ndarray, base: int, num_letters: int, filler: int = 0) -> str:
    """Three digits at a time as so many letters."""
    digits = np.pad(digits, (0, -len(digits) % AT_ONCE), constant_values=filler).reshape(-1, AT_ONCE)
    numbers = digits @ [base**2, base, 1]
    letters = [numbers // BASE**place % BASE for place in range(num_letters)]
    return _LETTERS[np.stack(letters[::-1], axis=1).astype(np.int64)].tobytes().decode()


def _unpacked(codes: str, base: int, num_letters: int) -> np.ndarray:
    letters = np.array([ALPHABET.index(letter) for letter in codes], dtype=np.int64).reshape(-1, num_letters)
    numbers = letters @ [BASE**place for place in range(num_letters)][::-1]
    return np.stack([numbers // base**2, numbers // base % base, numbers % base], axis=1).ravel()


def rounded(value: float, digits: int = 4) -> float:
    """To so many significant digits."""
    return float(f"{value:.{digits}g}")
