"""SWAG with RoBERTa, or any other encoder with a multiple-choice head: which of four endings follows?"""

from influence_core.tasks.columns import Label, Text
from influence_core.tasks.demo_corpus import demo_questions
from influence_core.tasks.multiple_choice import MultipleChoiceTask
from influence_core.tasks.pretrained import DEMO_DEFAULTS

ENDINGS = ("ending0", "ending1", "ending2", "ending3")


class SwagTask(MultipleChoiceTask):
    """Questions of at most `max_length` tokens a row."""

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
            "type_vocab_size=1,hidden_dropout_prob=0,attention_probs_dropout_prob=0",
            "max_length": 64,
            "learning_rate": 3e-4,
            "num_train_epochs": 6,
        },
    }
    endings = ENDINGS
    columns = {
        "sent1": Text(),
        "sent2": Text(),
        **dict.fromkeys(ENDINGS, Text(may_be_blank=False)),
        "label": Label(len(ENDINGS)),
    }

    def demo_rows(self, split):
        return demo_questions(split)

    def choices(self, row):
        if self.prompt.names != ["sent1", "sent2"] or not self.prompt.is_own:
            return super().choices(row)
        return [(row["sent1"], f"{row['sent2']} {row[ending]}") for ending in self.endings]
