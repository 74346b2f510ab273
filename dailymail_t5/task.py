"""CNN/DailyMail with T5: summaries, sequence to sequence; the measurement is the summary's summed cross-entropy."""

import re

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSeq2SeqLM, T5Config

from influence_core.errors import UserError
from influence_core.experiments.columns import Text
from influence_core.experiments.demo_corpus import demo_summaries
from influence_core.experiments.example import MEASUREMENT
from influence_core.experiments.pretrained import DEMO_DEFAULTS, PretrainedTask
from influence_core.layers import trackable_layer_names
from influence_core.losses import linear_cross_entropy
from influence_core.task import EXAMPLE_INDEX

PREFIX = "summarize: "
IGNORED = -100  # as a label: padding, that carries no loss
TRACKED = re.compile(r"(en|de)coder\.block\.\d+\.layer\.\d+\.(SelfAttention|EncDecAttention|DenseReluDense)\.\w+")
READS_ARTICLE = re.compile(r"encoder\..*|decoder\..*\.EncDecAttention\.[kv]")


class DailyMailTask(PretrainedTask):
    """Articles and their highlights; tracked are the attention and feed-forward layers of encoder and decoder."""

    name = "dailymail_t5"
    presets = {
        "full": {
            "model_name_or_path": "google-t5/t5-small",
            "dataset_name_or_path": "abisee/cnn_dailymail",
            "dataset_config": "3.0.0",
            "max_source_length": 1024,
            "max_target_length": 128,
            "num_queries": 10,
            "learning_rate": 5e-5,
            "weight_decay": 0.01,
            "num_train_epochs": 3,
            "train_batch_size.train": 16,
            "eval_batch_size": 32,
            "query_batch_size": 10,
            "train_batch_size.analyze": 16,
            "factor_batch_size": 16,
            "figure_dir": "figure/dailymail_t5",
        },
        "demo": {
            **DEMO_DEFAULTS,
            "checkpoint_dir": "demo/dailymail_t5/checkpoint",
            "output_dir": "demo/dailymail_t5/influence_results",
            "figure_dir": "demo/dailymail_t5/figure",
            "config_overrides": "num_layers=2,d_model=128,d_ff=512,num_heads=4,d_kv=32,dropout_rate=0",
            "max_source_length": 128,
            "max_target_length": 32,
            "learning_rate": 2e-3,
            "num_train_epochs": 8,
            "damping_factor": "heuristic",
        },
    }
    auto_model, config_class = AutoModelForSeq2SeqLM, T5Config
    follows = {
        "num_decoder_layers": "num_layers",
        "is_gated_act": "feed_forward_proj",
        "dense_act_fn": "feed_forward_proj",
        "scale_decoder_outputs": "tie_word_embeddings",
    }
    tokenizer_style = "t5"
    columns = {"article": Text(), "highlights": Text()}

    def __init__(self, max_source_length, max_target_length, **flags):
        super().__init__(**flags)
        self.max_source_length, self.max_target_length = max_source_length, max_target_length
        for name, length in (("source", max_source_length), ("target", max_target_length)):
            if length < 2:
                raise UserError(f"--max_{name}_length must be at least 2, a token and the end, not {length}")

    @staticmethod
    def add_arguments(parser):
        PretrainedTask.add_arguments(parser)
        parser.add_argument("--max_source_length", type=int, help="tokens of an article; longer ones are cut")
        parser.add_argument("--max_target_length", type=int, help="tokens of a summary; longer ones are cut")

    # ------------------------------------------------------------------------------------------------------- model

    def config_values(self):
        return super().config_values() | {"decoder_start_token_id": self.tokenizer.pad_token_id}

    def tracked_layer_names(self, model):
        return [name for name in trackable_layer_names(model) if TRACKED.fullmatch(name)]

    def position_mask(self, batch, layer_name):
        """Of the layer's own input stream: keys and values of cross-attention read the article, from the decoder."""
        return batch["attention_mask"] if READS_ARTICLE.fullmatch(layer_name) else batch["labels"] != IGNORED

    # -------------------------------------------------------------------------------------------------------- data

    def demo_rows(self, split):
        return demo_summaries(split)

    def tokenized(self, rows):
        articles = self._tokens([PREFIX + row["article"] for row in rows], self.max_source_length)
        summaries = self._tokens([row["highlights"] for row in rows], self.max_target_length)
        topics = ({"topic": row["topic"]} if "topic" in row else {} for row in rows)
        return [
            {"input_ids": article, "labels": summary, **topic}
            for article, summary, topic in zip(articles, summaries, topics)
        ]

    def _tokens(self, texts: list[str], max_length: int) -> list[np.ndarray]:
        rows = self.tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        return [np.array(row, dtype=np.int32) for row in rows]

    def length(self, example):
        return len(example["input_ids"]) + len(example["labels"])

    def collate(self, examples):
        """Articles and summaries, each padded to the longest of the batch."""
        articles, summaries = ([torch.tensor(x[key]).long() for x in examples] for key in ("input_ids", "labels"))
        return {
            "input_ids": pad_sequence(articles, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad_sequence(list(map(torch.ones_like, articles)), batch_first=True),
            "labels": pad_sequence(summaries, batch_first=True, padding_value=IGNORED),
        }

    def describe(self, example):
        return f"Summary: {self._text(example['labels'])}\nArticle: {self._text(example['input_ids'])}"

    def _text(self, tokens) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).removeprefix(PREFIX)

    def topic(self, example):
        return example.get("topic")

    # ------------------------------------------------------------------------------------------------------ losses

    @staticmethod
    def _hidden_states(model, batch) -> Tensor:
        """[examples, positions of the summary, d_model], what the head reads."""
        encoder_states = model.encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        hidden = model.decoder(
            model.prepare_decoder_input_ids_from_labels(batch["labels"]),
            encoder_hidden_states=encoder_states,
            encoder_attention_mask=batch["attention_mask"],
            use_cache=False,
        ).last_hidden_state
        return hidden * model.config.d_model**-0.5 if model.config.scale_decoder_outputs else hidden

    def train_loss(self, model, batch, sample_labels=None):
        labels, uniforms = batch["labels"], None
        if sample_labels is not None:
            uniforms = sample_labels.uniforms(batch[EXAMPLE_INDEX], labels.shape[1])
        return self.summary_loss(model, batch, labels, uniforms)

    def summary_loss(self, model, batch, labels, uniforms=None) -> Tensor:
        """Summed cross-entropy of the summary's positions against labels of the same shape, given or sampled."""
        return linear_cross_entropy(self._hidden_states(model, batch), model.lm_head.weight, labels, uniforms)

    def measurement(self, model, batch):
        return self.train_loss(model, batch)

    @torch.no_grad()
    def evaluation_values(self, model, batch):
        hidden, head = self._hidden_states(model, batch), model.lm_head.weight
        losses = [linear_cross_entropy(states, head, labels) for states, labels in zip(hidden, batch["labels"])]
        return {
            MEASUREMENT: torch.stack(losses).double(),
            "tokens": (batch["labels"] != IGNORED).sum(1).double(),
        }

    @torch.no_grad()
    def generation_values(self, model, batch):
        """ROUGE of summaries that the model writes, taking the likeliest token each time."""
        from influence_core.experiments.metrics import rouge  # only where it is needed: it takes long to import

        written = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=self.max_target_length,
            do_sample=False,
            num_beams=1,
        )
        references = [self._text(labels[labels != IGNORED]) for labels in batch["labels"]]
        scores = rouge([self._text(tokens) for tokens in written], references)
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in scores.items()}

    def metrics(self, values):
        scores = {name: float(each.mean()) for name, each in values.items() if name.startswith("rouge")}
        return {"loss": float(values[MEASUREMENT].sum() / values["tokens"].sum()), **scores}

    def query_metrics(self, values):
        return {
            "mean query loss": float((values[MEASUREMENT] / values["tokens"]).mean()),
            "ROUGE-L": float(values["rougeL"].mean()),
        }
