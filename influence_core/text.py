"""Text for a person to look at: what a terminal or a page would act on, or not show, is shown as an escape."""

import re

# Characters that act (control characters; those that turn the direction of what follows, break lines or annotate) or
# can't be seen: Unicode's Cc but line breaks and tabs, Cs, Zl, Zp, its Cf without the few signs that are drawn, and
# what else is "default ignorable". All kinds of blanks are blanks, and stay.
_HIDDEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U00013430-\U0001343f"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
# Letters and signs beside which some of them are how a word or a picture is written. None of these is hidden itself.
_JOINING = (  # Arabic, Syriac, N'Ko, Mandaic; the scripts of India and their relatives; Mongolian; Adlam
    "\u0600-\u061b\u061d-\u0dff\u0f00-\u109f\u1780-\u17b3\u17b6-\u180a\u1810-\u1cff\ua800-\ua95f\ua980-\uabff"
    "\ufb50-\ufdff\ufe70-\ufefe\U00010840-\U00011fff\U0001e900-\U0001e95f"
)
_WITHOUT_BLANKS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17b3\u17b6-\u17ff\u1950-\u19ff\u1a20-\u1aaf"  # Thai, Khmer …
_MONGOLIAN = "\u1800-\u180a\u1810-\u18af"
_IDEOGRAPHS = "\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uff9f\U00020000-\U0003ffff"
_HIEROGLYPHS = "\U00013000-\U0001342f\U00013440-\U0001345f"
_MATHEMATICS = "\u2200-\u22ff\u2a00-\u2aff"
_PICTURES = (
    "\xa9\xae\u203c\u2049\u2122\u2139\u2190-\u21ff\u2300-\u23ff\u2460-\u24ff\u25a0-\u27bf\u2900-\u297f\u2b00-\u2bff"
    "\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"
)


def _flag(region: str) -> str:
    """The picture of a flag: a black one, then the region's letters as tags, then the tag that ends it."""
    return "\U0001f3f4" + "".join(chr(0xE0000 + ord(letter)) for letter in f"{region}\x7f")


_WRITTEN = "|".join(
    (
        f"(?<=[{_JOINING}])[\u200c\u200d]",  # (non-)joiners, as in Persian
        f"(?<=[{_PICTURES}])\ufe0f?\u200d(?=[{_PICTURES}])",  # pictures joined to one
        f"(?<=[{_PICTURES}])[\ufe0e\ufe0f]",  # in colour or not
        "(?<=[0-9#*])\ufe0f(?=\u20e3)",  # a key
        "|".join(map(_flag, ("gbeng", "gbsct", "gbwls"))),  # the flags that are in use
        f"(?<=[{_IDEOGRAPHS}])[\ufe00-\ufe02\U000e0100-\U000e01ef]",  # the form of one
        f"(?<=[{_MATHEMATICS}\u1000-\u109f\uaa60-\uaa7f])\ufe00",  # also of letters of Myanmar
        f"(?<=[{_MONGOLIAN}])[\u180b-\u180f]{{1,2}}",
        f"(?<=[{_HIEROGLYPHS}])[\U00013430-\U0001343f]{{1,2}}",
        f"(?<=[{_WITHOUT_BLANKS}])\u200b(?=[{_WITHOUT_BLANKS}])",  # where a line may end
    )
)
_ANY_HIDDEN = re.compile(f"[{_HIDDEN}]")
_WRITTEN_OR_HIDDEN = re.compile(f"({_WRITTEN})|[{_HIDDEN}]")


def visible(text: str) -> str:
    """The text with what is hidden, or acts on a terminal, shown as escapes; line breaks and tabs stay.

    Where such a character is part of how a script is written (Persian words, pictures of several), one of it stays.
    """
    if not _ANY_HIDDEN.search(text):  # as in most texts: the whole pattern takes many times as long
        return text
    return _WRITTEN_OR_HIDDEN.sub(lambda found: found[1] or ascii(found[0])[1:-1], text)
