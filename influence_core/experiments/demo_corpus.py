"""A small real English corpus that every Python carries: the topics of its own documentation (`pydoc_data.topics`)."""

import re
from functools import cache

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

DEMO_CORPUS = "pydoc_data.topics"  # as --dataset_name_or_path: this corpus
END_OF_TEXT = "<|endoftext|>"
ROBERTA_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # in the order of their indices


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


def train_tokenizer(texts: list[str], vocab_size: int, for_pairs: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the texts, with the special tokens of GPT-2 or, `for_pairs`, of RoBERTa."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = ROBERTA_TOKENS if for_pairs else [END_OF_TEXT]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if not for_pairs:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
    ends = ((token, tokenizer.token_to_id(token)) for token in ("</s>", "<s>"))
    tokenizer.post_processor = processors.RobertaProcessing(*ends)
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", mask_token="<mask>", **names)
