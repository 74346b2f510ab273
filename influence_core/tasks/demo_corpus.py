"""A small real English corpus that every Python carries: the topics of its own documentation (`pydoc_data.topics`)."""

import re
from functools import cache

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from influence_core.errors import UserError

LONG_WORD = re.compile(r"(\S{1000})")
DEMO_CORPUS = "pydoc_data.topics"  # as --dataset_name_or_path: this corpus
HEADING = re.compile(r"(.+)\n([*=\-~^])\2{3,}")  # a line of text, underlined
# Special tokens of new tokenizers, in the order of their indices, and what they are for.
SPECIAL_TOKENS = {
    "gpt2": {"<|endoftext|>": ("bos", "eos")},
    "roberta": {
        "<s>": ("bos", "cls"), "<pad>": ("pad",), "</s>": ("eos", "sep"), "<unk>": ("unk",), "<mask>": ("mask",),
    },
    "t5": {"<pad>": ("pad",), "</s>": ("eos",), "<unk>": ("unk",)},
}  # fmt: skip


@cache
def demo_corpus() -> dict[str, str]:
    """{topic: text}. Passages that several topics repeat stay with the shortest of them only.

    The long topics quote the short ones word for word; left in, they would put held-out text into the training set
    and blur which topic a passage belongs to.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    corpus = {}
    for topic, text in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            paragraph = paragraph.strip("\n")
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph)
        corpus[topic] = "\n\n".join(kept)
    return corpus


def demo_questions(split: str) -> list[dict]:
    """Multiple choice, as SWAG has it: the sentence that follows, against three from other topics.

    Returns:
        [{"sent1", "sent2" (how the next sentence begins), "ending0" … "ending3", "label", "topic"}]; every eighth
        question is of "validation".
    """
    pairs = []  # (topic, sentence, beginning of the next, rest of it)
    for topic, text in sorted(demo_corpus().items()):
        sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.!?:])\s+", text)]
        for sentence, following in zip(sentences, sentences[1:]):
            if all(6 <= len(part.split()) <= 25 for part in (sentence, following)):
                words = following.split()
                pairs.append((topic, sentence, " ".join(words[:2]), " ".join(words[2:])))
    # Wrong endings are of the same split: those of the other one were right answers there, and would be taken for it.
    held_out = split == "validation"
    pairs = [pair for number, pair in enumerate(pairs) if (number % 8 == 7) == held_out]
    rng = np.random.default_rng(0)
    questions = []
    for topic, sentence, beginning, ending in pairs:
        endings = [ending]
        while len(endings) < 4:
            other = pairs[rng.integers(len(pairs))]
            if other[0] != topic:
                endings.append(other[3])
        order = rng.permutation(4)
        question = {"sent1": sentence, "sent2": beginning, "label": int(np.argmin(order)), "topic": topic}
        questions.append(question | {f"ending{place}": endings[which] for place, which in enumerate(order)})
    return questions


def demo_summaries(split: str) -> list[dict]:
    """Summaries, as CNN/DailyMail has them: of a passage, the heading above it and its first sentence.

    Returns:
        [{"article", "highlights", "topic"}]; every eighth passage is of "validation".
    """
    rows = []
    for topic, text in sorted(demo_corpus().items()):
        heading = ""
        for paragraph in text.split("\n\n"):
            if underlined := HEADING.fullmatch(paragraph):
                heading = underlined[1]
                continue
            passage = " ".join(paragraph.split())
            first = re.split(r"(?<=[.!?:])\s", passage)[0]
            is_text = "---" not in passage and len(passage.split()) >= 20 and len(first) < len(passage)
            if heading and is_text:
                rows.append({"article": passage, "highlights": f"{heading}: {first}", "topic": topic})
    return [row for number, row in enumerate(rows) if (number % 8 == 7) == (split == "validation")]


def train_tokenizer(texts: list[str], vocab_size: int, style: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the texts, with special tokens as those of "gpt2", "roberta" or "t5"."""
    special_tokens = SPECIAL_TOKENS[style]
    least = len(pre_tokenizers.ByteLevel.alphabet()) + len(special_tokens)
    if vocab_size < least:
        raise UserError(f"--vocab_size must be at least {least}, for all bytes and special tokens, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Training takes the square of a word's length, so what no word is, a line of base64 say, is taken in parts.
    tokenizer.train_from_iterator((LONG_WORD.sub(r"\1 ", text) for text in texts), trainer)
    end = ("</s>", tokenizer.token_to_id("</s>"))
    if style == "roberta":
        tokenizer.post_processor = processors.RobertaProcessing(end, ("<s>", tokenizer.token_to_id("<s>")))
    elif style == "t5":
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[end])
    names = {f"{use}_token": token for token, uses in special_tokens.items() for use in uses}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
