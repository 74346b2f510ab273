"""What a person could not see, or a terminal would act on, is shown as an escape; what people write stays as it is."""

import io
import logging
import subprocess
import sys
import unicodedata
import warnings

import pytest

from influence_core import progress
from influence_core.errors import UserError
from influence_core.experiments.output import VisibleErrors
from influence_core.experiments.running import run_script  # noqa: F401 - for the process that a test starts
from influence_core.text import visible
from tests.scripts import ROOT

# Signs that Unicode counts among the format characters, and that are drawn.
DRAWN = {*map(chr, range(0x600, 0x606)), *"\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"}
# "Default ignorable" in Unicode's data, and in none of the categories below.
IGNORABLE = {*"\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0", *map(chr, range(0xFE00, 0xFE10)),
             *map(chr, range(0xE0100, 0xE01F0))}  # fmt: skip

SHOWN = {
    "colour": ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
    "title of the window": ("\x1b]0;gone\x07", "\\x1b]0;gone\\x07"),
    "8-bit control sequence": ("\x9b2J", "\\x9b2J"),
    "overwriting": ("accuracy 0.1\raccuracy 0.9", "accuracy 0.1\\raccuracy 0.9"),
    "backspace and delete": ("a\x08\x7fb", "a\\x08\\x7fb"),
    "next line": ("a\x85b", "a\\x85b"),
    "line and paragraph separators": ("a\u2028b\u2029c", "a\\u2028b\\u2029c"),
    "turned": ("abc\u202egnirts\u202c", "abc\\u202egnirts\\u202c"),
    "isolated": ("\u2066a\u2069", "\\u2066a\\u2069"),
    "marks of direction": ("a\u200eb\u200fc\u061cd", "a\\u200eb\\u200fc\\u061cd"),
    "zero width": ("pass\u200bword\u2060\ufeff", "pass\\u200bword\\u2060\\ufeff"),
    "soft hyphen": ("pass\xadword", "pass\\xadword"),
    "joiners of Latin": ("a\u200cb\u200dc", "a\\u200cb\\u200dc"),
    "more than one joiner": ("\u0645\u200c\u200c\u062e", "\u0645\u200c\\u200c\u062e"),
    "joiner of one picture": ("\U0001f469\u200d", "\U0001f469\\u200d"),
    "variation of a letter": ("a\ufe0fb\ufe01", "a\\ufe0fb\\ufe01"),
    "bytes in the variations of a picture": (
        "\U0001f600\U000e0138\U000e0155",
        "\U0001f600\\U000e0138\\U000e0155",
    ),
    "tags": ("hi\U000e0049\U000e0067", "hi\\U000e0049\\U000e0067"),
    "tags of no flag": ("\U0001f3f4\U000e0061\U000e007f", "\U0001f3f4\\U000e0061\\U000e007f"),
    "fillers": ("\u3164\u115f\uffa0", "\\u3164\\u115f\\uffa0"),
    "half of a pair": ("\ud83d", "\\ud83d"),
}

WRITTEN = {
    "blanks": "a\tb\n\xa0c\u3000d\u2009e",
    "Latin": "naïve Straße, œuvre — “quoted” … e\u0301",
    "Greek, Cyrillic": "Ελληνικά, русский",
    "Hebrew with points": "שָׁלוֹם",
    "Arabic": "السلام عليكم \u06dd",
    "Persian": "می\u200cخواهم کتاب\u200cها را",
    "Persian abbreviation": "ه\u200d.ش",
    "Hindi": "क्\u200dष और क्\u200cष",
    "Sinhala": "ශ්\u200dරී",
    "Bengali": "র\u200d্যাব",
    "Malayalam": "അവന്\u200d",
    "Thai, Khmer": "ภาษา\u200bไทย ភាសា\u200bខ្មែរ",
    "Myanmar": "မြန်မာ",
    "Mongolian": "ᠮᠣᠩᠭᠣᠯ\u180eᠠ ᠠ\u180b",
    "Chinese, Japanese, Korean": "中文,葛\U000e0100城。かな 한국어",
    "mathematics": "∩\ufe00 ≨\ufe00 ∑x²",
    "pictures": "☺️ ☎︎ 👍🏽 🇩🇪 ‼️ 1️⃣ #️⃣",
    "joined pictures": "👩\u200d👩\u200d👧 ❤️\u200d🔥 🏳️\u200d🌈 🙂\u200d↔️ 🧑🏽\u200d🚀 👩\u200d⚕️",
    "flags of regions": "".join(
        "\U0001f3f4" + "".join(chr(0xE0000 + ord(letter)) for letter in region + "\x7f")
        for region in ("gbeng", "gbsct", "gbwls")
    ),
    "backslashes": r"C:\x1b \u202e",
}


@pytest.mark.parametrize("kind", SHOWN)
def test_what_is_hidden_or_acts_is_shown(kind):
    text, shown = SHOWN[kind]
    assert visible(text) == shown


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_people_write_stays(kind):
    assert visible(WRITTEN[kind]) == WRITTEN[kind]


def test_every_character_by_itself():
    """Against Unicode's own categories: alone, each that is hidden or acts is shown, and no other."""
    for number in range(0x110000):
        character = chr(number)
        category = unicodedata.category(character)
        is_hidden = category in ("Cc", "Cs", "Cf", "Zl", "Zp") and character not in DRAWN | {"\n", "\t"}
        if is_hidden or character in IGNORABLE:
            assert visible(f"a{character}") == f"a{ascii(character)[1:-1]}"
        elif category != "Cn":  # not yet assigned: blocks of hidden characters have such in them
            assert visible(f"a{character}") == f"a{character}"


# ------------------------------------------------------------------------------------------------- ways to a terminal

ESCAPES = "\x1b[31m \x9b \u202e \U000e0041"
IN_WORDS = "\\x1b[31m \\x9b \\u202e \\U000e0041"


def every_way():
    """A script that says it in every way that there is; the last one is its end."""
    print(f"print {ESCAPES}")
    print(f"error {ESCAPES}", file=sys.stderr)
    warnings.warn(f"warning {ESCAPES}", stacklevel=1)
    logging.getLogger("without a handler").warning(f"logger {ESCAPES}")
    logging.getLogger("transformers").warning(f"transformers {ESCAPES}")  # whose handler was there before the script
    progress.SECONDS_BETWEEN_LINES = 0
    with progress.progress(2, f"description {ESCAPES}") as bar:
        bar.note(f"note {ESCAPES}")
        bar.update()
        bar.write(f"written {ESCAPES}")
    raise UserError(f"refusal {ESCAPES}")


WAYS = ["print", "error", "warning", "logger", "transformers", "description", "note", "written", "refusal"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["pipe", "terminal"])
def test_every_way_to_a_terminal(where, terminal):
    code = "import transformers\nfrom tests.test_text import every_way, run_script\nrun_script(every_way)"
    command = [sys.executable, "-c", code]
    if where == "terminal":
        shown = terminal(command).replace("\x1b[A", "").replace("\r", "")  # a bar's own
    else:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
        shown = done.stdout + done.stderr
    for way in WAYS:
        assert f"{way} {IN_WORDS}" in shown, f"{way}: {shown}"
    assert not ({*ESCAPES} - {*IN_WORDS}) & {*shown}


@pytest.mark.parametrize("text, shown", [
    ("\rTrain: 50%", "\rTrain: 50%"), ("\r", "\r"), ("\x1b[A\x1b[A", "\x1b[A\x1b[A"), ("\n\n", "\n\n"),
    ("\rTrain\x1b[2J\r", "\rTrain\\x1b[2J\\r"), ("\x1b[Aoverwritten", "\\x1b[Aoverwritten"),
    ("a\rb", "a\\rb"), ("\x1b[B", "\\x1b[B"),
])  # fmt: skip
def test_what_bars_write_moves_them(text, shown):
    """A bar is written from the beginning of its line; anything else that moves is shown."""
    stream = io.StringIO()
    VisibleErrors(stream).write(text)
    assert stream.getvalue() == shown
