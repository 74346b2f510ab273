"""A small real English corpus that every Python carries: the topics of its own documentation (`pydoc_data.topics`)."""

import re
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


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


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as GPT-2 has it, trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
