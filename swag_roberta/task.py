"""SWAG with RoBERTa: which of four endings follows? An example is a question, four rows of a batch."""

import re

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForMultipleChoice, RobertaConfig

from influence_core.errors import UserError
from influence_core.experiments.columns import Label, Text
from influence_core.experiments.demo_corpus import demo_questions
from influence_core.experiments.example import MEASUREMENT
from influence_core.experiments.pretrained import DEMO_DEFAULTS, PretrainedTask
from influence_core.layers import trackable_layer_names
from influence_core.task import EXAMPLE_INDEX

ENDINGS = ("ending0", "ending1", "ending2", "ending3")
TRACKED = re.compile(r"(roberta\.(encoder|pooler)\..*|classifier)")


class SwagTask(PretrainedTask):
    """Questions of at most `max_length` tokens a row; tracked are the layers of encoder, pooler and classifier."""

    name = "swag_roberta"
    presets = {
        "full": {
            "model_name_or_path": "FacebookAI/roberta-base",
            "dataset_name_or_path": "allenai/swag",
            "dataset_config": "regular",
            "max_length": 128,
            "num_train": 73_536,
            "num_queries": 2_000,
            "learning_rate": 1e-5,
            "weight_decay": 0.001,
            "num_train_epochs": 3,
            "train_batch_size.train": 16,
            "eval_batch_size": 32,
            "factor_batch_size": 128,
            "query_batch_size": 100,
            "train_batch_size.analyze": 128,
            "figure_dir": "figure/swag_roberta",
        },
        "demo": {
            **DEMO_DEFAULTS,
            "checkpoint_dir": "demo/swag_roberta/checkpoint",
            "output_dir": "demo/swag_roberta/influence_results",
            "figure_dir": "demo/swag_roberta/figure",
            "config_overrides": "num_hidden_layers=2,hidden_size=128,num_attention_heads=4,intermediate_size=512,"
            "hidden_dropout_prob=0,attention_probs_dropout_prob=0",
            "max_length": 64,
            "learning_rate": 3e-4,
            "num_train_epochs": 6,
        },
    }

    auto_model, config_class = AutoModelForMultipleChoice, RobertaConfig
    tokenizer_style = "roberta"
    columns = {
        "sent1": Text(),
        "sent2": Text(),
        **dict.fromkeys(ENDINGS, Text(may_be_blank=False)),
        "label": Label(len(ENDINGS)),
    }

    # The endings of a question are four rows that make one example. Their gradients add up, so the engine may lay them
    # end to end; post_process_per_sample_gradient below says the same in full, for tasks where they do not just add up.
    rows_per_example = len(ENDINGS)

    def __init__(self, max_length, **flags):
        super().__init__(**flags)
        self.max_length = max_length
        if max_length < 8:
            raise UserError(f"--max_length must be at least 8, so that a question has words, not {max_length}")

    @staticmethod
    def add_arguments(parser):
        PretrainedTask.add_arguments(parser)
        parser.add_argument("--max_length", type=int, help="tokens of a row, question and ending; longer ones are cut")

    # ------------------------------------------------------------------------------------------------------- model

    def config_values(self):
        # RoBERTa counts positions from the padding's index on.
        positions = self.max_length + self.tokenizer.pad_token_id + 1
        return super().config_values() | {"max_position_embeddings": positions, "type_vocab_size": 1}

    def load_model(self, checkpoint_dir):
        model = super().load_model(checkpoint_dir)
        num_positions = model.config.max_position_embeddings - model.config.pad_token_id - 1
        if self.max_length > num_positions:
            raise UserError(f"--max_length {self.max_length} is more than the model's {num_positions} positions")
        return model

    def tracked_layer_names(self, model):
        return [name for name in trackable_layer_names(model) if TRACKED.fullmatch(name)]

    def position_mask(self, batch, layer_name):
        """Pooler and classifier see one position a row, the first; all other layers see the tokens."""
        if "encoder" not in layer_name:
            return None
        return batch["attention_mask"].flatten(0, 1)

    def post_process_per_sample_gradient(self, layer_name, gradient):
        """[4 * examples, out, in(+1)] -> [examples, out, in(+1)]: a question's gradient is the sum over its endings."""
        return gradient.unflatten(0, (-1, len(ENDINGS))).sum(1)

    # ------------------------------------------------------------------------------------------------------- data

    def demo_rows(self, split):
        return demo_questions(split)

    def tokenized(self, questions):
        first = [question["sent1"] for question in questions for _ in ENDINGS]
        second = [f"{question['sent2']} {question[ending]}" for question in questions for ending in ENDINGS]
        rows = self.tokenizer(first, second, truncation=True, max_length=self.max_length)["input_ids"]
        rows = [np.array(row, dtype=np.int32) for row in rows]
        return [
            {**question, "input_ids": rows[len(ENDINGS) * number : len(ENDINGS) * (number + 1)]}
            for number, question in enumerate(questions)
        ]

    def length(self, example):
        return max(map(len, example["input_ids"]))

    def collate(self, examples):
        """Rows padded to the longest of the batch: what is padding changes no score."""
        longest = max(len(row) for example in examples for row in example["input_ids"])
        tokens = torch.full((len(examples), len(ENDINGS), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(tokens)
        for example, token_rows, mask_rows in zip(examples, tokens, mask):
            for row, token_row, mask_row in zip(example["input_ids"], token_rows, mask_rows):
                token_row[: len(row)] = torch.from_numpy(row)
                mask_row[: len(row)] = 1
        labels = torch.tensor([example["label"] for example in examples])
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}

    def describe(self, example):
        lines = [f"{example['sent1']} {example['sent2']} …"]
        for number, ending in enumerate(ENDINGS):
            lines.append(f"  {'->' if number == example['label'] else '  '} {example[ending]}")
        return "\n".join(lines)

    def topic(self, example):
        return example.get("topic")

    # ----------------------------------------------------------------------------------------------------- losses

    @staticmethod
    def _logits(model, batch) -> Tensor:
        """[examples, 4], in float32 at least."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def train_loss(self, model, batch, sample_labels=None):
        logits, labels = self._logits(model, batch), batch["labels"]
        if sample_labels is not None:
            uniforms = sample_labels.uniforms(batch[EXAMPLE_INDEX], 1)[:, 0]
            labels = sample_labels.sample(logits.detach(), uniforms.to(logits.device))
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    def measurement(self, model, batch):
        return negative_margin(self._logits(model, batch), batch["labels"]).sum()

    @torch.no_grad()
    def evaluation_values(self, model, batch):
        logits, labels = self._logits(model, batch), batch["labels"]
        return {
            MEASUREMENT: negative_margin(logits, labels).double(),
            "loss": torch.nn.functional.cross_entropy(logits, labels, reduction="none").double(),
            "prediction": logits.argmax(-1).double(),
            "label": labels.double(),
        }

    def metrics(self, values):
        return {"loss": float(values["loss"].mean()), "accuracy": self._accuracy(values)}

    def query_metrics(self, values):
        return {
            "query accuracy": self._accuracy(values),
            "mean measurement": float(values[MEASUREMENT].mean()),
        }

    @staticmethod
    def _accuracy(values) -> float:
        from influence_core.experiments.metrics import accuracy  # only where it is needed: it takes long to import

        return accuracy(values["prediction"], values["label"])


def negative_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """[examples], -(logit of the right ending - logsumexp of the others), as in TRAK (Park et al. 2023)."""
    right = logits.gather(-1, labels[:, None])[:, 0]
    others = logits.scatter(-1, labels[:, None], float("-inf"))
    return others.logsumexp(-1) - right
