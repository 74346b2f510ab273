"""The text of each token: pieces joined read as the text, for real tokenizers and for what is hard on them."""

import time

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from influence_core.tasks.pieces import PieceReader
from tests.report_pages import byte_tokenizer
from tests.scripts import SHARED

TEXTS = {
    "words": "Hello world, this isn't hard: (ok) – done.",
    "spaces": " two  spaces\n\nand\tlines ",
    "emoji": "a 😀 and a family 👩‍👩‍👧 and a flag 🇮🇷",
    "cjk": "日本語 and 中文, 한국어",
    "controls": "\x1b[31mred\x07\x00 \u2028 \u202e",
    "scripts": "naïve é ß فارسی‌ها हिन्दी",
    "html": "<script>alert('&amp;')</script>",
}


def read(tokenizer, tokens):
    pieces = PieceReader(tokenizer).read(tokens)
    assert sum(piece.num_tokens for piece in pieces) == len(tokens)
    return pieces


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", ["gpt2", "roberta", "t5"])
def test_real_tokenizers(name, text):
    """The pieces joined are what the tokenizer itself makes of all the tokens."""
    place = SHARED / "models" / f"{name}-tokenizer"
    if not place.is_dir():
        pytest.skip(f"no {place}")
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokens = tokenizer(text)["input_ids"]
    joined = "".join(piece.text for piece in read(tokenizer, tokens))
    assert joined == tokenizer.decode(tokens)
    if name != "t5":  # which has no token for many a character
        assert text in joined


def test_parts_of_a_character_are_one_piece():
    """Three and four bytes, each a token, are one piece; what is around them is as it was."""
    tokenizer = byte_tokenizer()
    pieces = read(tokenizer, tokenizer("a日😀b")["input_ids"])
    assert [(piece.text, piece.num_tokens) for piece in pieces] == [("a", 1), ("日", 3), ("😀", 4), ("b", 1)]


def test_a_character_that_is_cut_off():
    """At either end of a block, as blocks are cut at tokens: shown as what can't be read, and counted."""
    tokenizer = byte_tokenizer()
    tokens = tokenizer("日本x")["input_ids"]
    assert [(piece.text, piece.num_tokens) for piece in read(tokenizer, tokens[1:4])] == [("�", 1), ("�", 1), ("�", 1)]
    assert [piece.text for piece in read(tokenizer, tokens[3:])] == ["本", "x"]


def test_bytes_of_sentencepiece():
    """<0xE2> and its like are bytes of a character."""
    vocabulary = {"<unk>": 0, "<0xE6>": 1, "<0x97>": 2, "<0xA5>": 3, "▁a": 4, "a": 5, "▁": 6}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert [piece.text for piece in read(tokenizer, [4, 1, 2, 3, 4])] == ["a", "日", " a"]


def test_word_pieces():
    """A word's later parts follow without a space."""
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "a": 3, "[CLS]": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]")
    assert [piece.text for piece in read(tokenizer, [1, 2, 3, 0])] == ["play", "ing", " a", "[UNK]"]
    assert read(tokenizer, [4, 1])[0].text == "[CLS]"


def test_what_is_no_token():
    """More embeddings than tokens: the number is shown."""
    tokenizer = byte_tokenizer()
    assert [piece.text for piece in read(tokenizer, [len(tokenizer) + 7, -100])] == [
        f"<{len(tokenizer) + 7}>",
        "<-100>",
    ]
    assert read(tokenizer, []) == []


def test_a_million_tokens_take_seconds():
    """Entries of the vocabulary are asked for once."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS.values(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokens = tokenizer(" ".join(TEXTS.values()))["input_ids"]
    tokens *= 10**6 // len(tokens)
    start = time.perf_counter()
    PieceReader(tokenizer).read(tokens)
    assert time.perf_counter() - start < 10
