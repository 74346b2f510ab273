"""WikiText-2 with GPT-2, or any other causal language model: blocks of text."""

from influence_core.tasks.causal_lm import CausalLMTask
from influence_core.tasks.columns import Text
from influence_core.tasks.demo_corpus import demo_corpus
from influence_core.tasks.pretrained import DEMO_DEFAULTS

HELD_OUT = 8  # of the blocks of a topic in the demo, every eighth is for validation


class WikiTextTask(CausalLMTask):
    """Rows are joined by the thousand, as the Hugging Face example does, and cut into blocks of `block_size` tokens."""

    name = "wikitext_gpt2"
    presets = {
        "full": {
            "model_name_or_path": "openai-community/gpt2",
            "dataset_name_or_path": "Salesforce/wikitext",
            "dataset_config": "wikitext-2-raw-v1",
            "block_size": 512,
            "learning_rate": 3e-5,
            "weight_decay": 0.01,
            "num_train_epochs": 3,
            "train_batch_size.train": 8,
            "eval_batch_size": 16,
            "damping_factor": "0.01x",  # the best by LDS, see README.md, as is the next
            "track": "all",
            "query_batch_size": 32,
            "train_batch_size.analyze": 64,
            "factor_batch_size": 64,
        },
        "demo": {
            **DEMO_DEFAULTS,
            "checkpoint_dir": "demo/wikitext_gpt2/checkpoint",
            "output_dir": "demo/wikitext_gpt2/influence_results",
            "config_overrides": "n_layer=2,n_embd=192,n_head=6,n_positions=128,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0",
            "block_size": 64,
            "learning_rate": 2e-3,
            "num_train_epochs": 5,
            "damping_factor": "0.01x",
            "track": "all",
            "show_queries": 3,
            "figure_dir": "demo/wikitext_gpt2/figure",
        },
    }
    columns = {"text": Text()}

    def demo_examples(self, split):
        """Blocks of each topic by itself, so that a block has one topic; every eighth is held out."""
        return [
            {"input_ids": block, "topic": topic}
            for topic, text in sorted(demo_corpus().items())
            for number, block in enumerate(self.blocks([text]))
            if (number % HELD_OUT == HELD_OUT - 1) == (split == "validation")
        ]
