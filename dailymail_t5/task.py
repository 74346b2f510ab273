"""CNN/DailyMail with T5, or any other encoder-decoder: summaries of articles."""

from influence_core.tasks.columns import Text
from influence_core.tasks.demo_corpus import demo_summaries
from influence_core.tasks.pretrained import DEMO_DEFAULTS
from influence_core.tasks.seq2seq import Seq2SeqTask


class DailyMailTask(Seq2SeqTask):
    """Articles and their highlights."""

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
            "damping_factor": "heuristic",  # the best by LDS, see README.md, as is the next
            "track": "all",
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
            "track": "all",
        },
    }
    columns = {"article": Text(), "highlights": Text()}
    source_name, target_name, own_prefix = "Article", "Summary", "summarize: "

    def demo_rows(self, split):
        return demo_summaries(split)
