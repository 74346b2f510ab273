"""Numbers as short text, for a page that holds a million of them; page.js reads them again.

Values are kept relative to the strongest one, as the sign and the square root of their share, in 419 steps: 1.5
characters each, exact to 0.3 % near the strongest, to 1 % at a tenth of it, and zero below 1.5 millionths.
"""

from collections.abc import Sequence

import numpy as np

# What neither JSON in a page nor HTML has to escape.
ALPHABET = "".join(chr(code) for code in range(32, 127) if chr(code) not in "\"\\<>&'")
BASE = len(ALPHABET)
STEPS = 419  # on either side of zero: two values make a number below BASE ** 3
_LETTERS = np.frombuffer(ALPHABET.encode(), dtype=np.uint8)


def encode_values(values: np.ndarray) -> list:
    """[strongest magnitude, codes] of numbers; [0, ""] where all are zero."""
    strongest = float(np.abs(values).max(initial=0.0))
    if not strongest:
        return [0, ""]
    shares = np.asarray(values, dtype=np.float64) / strongest
    steps = np.rint(STEPS * np.sign(shares) * np.sqrt(np.abs(shares))).astype(np.int64) + STEPS
    steps = np.pad(steps, (0, len(steps) % 2), constant_values=STEPS)
    numbers = steps[0::2] * (2 * STEPS + 1) + steps[1::2]
    digits = np.stack([numbers // BASE**2, numbers // BASE % BASE, numbers % BASE], axis=1)
    return [rounded(strongest), _LETTERS[digits].tobytes().decode()]


def decode_values(coded: list, count: int) -> np.ndarray:
    """The numbers again, as page.js reads them."""
    strongest, codes = coded
    if not codes:
        return np.zeros(count)
    digits = np.array([ALPHABET.index(letter) for letter in codes]).reshape(-1, 3)
    numbers = digits @ [BASE**2, BASE, 1]
    steps = np.stack([numbers // (2 * STEPS + 1), numbers % (2 * STEPS + 1)], axis=1).ravel()[:count] - STEPS
    return strongest * np.sign(steps) * (steps / STEPS) ** 2


def encode_lengths(lengths: Sequence[int]) -> str:
    """A character for each length; the last of the alphabet means as much, and more to come."""
    most = BASE - 1
    return "".join(ALPHABET[most] * (length // most) + ALPHABET[length % most] for length in lengths)


def rounded(value: float, digits: int = 4) -> float:
    """To so many significant digits."""
    return float(f"{value:.{digits}g}")
