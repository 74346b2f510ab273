"""WikiText-2 with GPT-2: a causal language model on blocks of text; the measurement is the summed cross-entropy."""

import itertools
import re

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from influence_core.errors import UserError
from influence_core.experiments.columns import Text
from influence_core.experiments.demo_corpus import demo_corpus
from influence_core.experiments.example import MEASUREMENT
from influence_core.experiments.pretrained import DEMO_DEFAULTS, PretrainedTask
from influence_core.layers import trackable_layer_names
from influence_core.losses import linear_cross_entropy
from influence_core.task import EXAMPLE_INDEX

HELD_OUT = 8  # of the blocks of a topic in the demo, every eighth is for validation
TRACKED = re.compile(r"transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)")
FUSED_GELU = "gelu_pytorch_tanh"  # the function that GPT-2's config calls gelu_new, as one kernel instead of eight


class WikiTextTask(PretrainedTask):
    """Blocks of `block_size` tokens; tracked are the attention and MLP layers of every block of GPT-2."""

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
            "damping_factor": "0.01x",  # the best by LDS, see README.md
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
            "show_queries": 3,
            "figure_dir": "demo/wikitext_gpt2/figure",
        },
    }

    auto_model, config_class = AutoModelForCausalLM, GPT2Config
    columns = {"text": Text()}
    tokenizer_style, pads = "gpt2", False  # blocks are whole
    # Rows are joined by the thousand, as the Hugging Face example does, and cut into blocks.
    one_example_a_row, rows_at_once = False, 1000

    def __init__(self, block_size, **flags):
        super().__init__(**flags)
        self.block_size = block_size
        if block_size < 2:
            raise UserError(f"--block_size must be at least 2, so that there is a next token, not {block_size}")

    @staticmethod
    def add_arguments(parser):
        PretrainedTask.add_arguments(parser)
        parser.add_argument("--block_size", type=int, help="tokens of a sequence")

    # ------------------------------------------------------------------------------------------------------- model

    def adapt_config(self, config):
        if getattr(config, "activation_function", None) == "gelu_new":
            config.activation_function = FUSED_GELU

    def load_model(self, checkpoint_dir):
        model = super().load_model(checkpoint_dir)
        num_positions = getattr(model.config, "max_position_embeddings", self.block_size)
        if self.block_size > num_positions:
            raise UserError(f"--block_size {self.block_size} is more than the model's {num_positions} positions")
        return model

    def tracked_layer_names(self, model):
        return [name for name in trackable_layer_names(model) if TRACKED.fullmatch(name)]

    # ------------------------------------------------------------------------------------------------------- data

    def make_examples(self, split):
        examples = self._demo_examples(split) if self.is_demo else super().make_examples(split)
        if not examples:
            raise UserError(f"the {split} split has not one block of {self.block_size} tokens: lower --block_size")
        return examples

    def tokenized(self, rows):
        """Rows joined and cut into whole blocks; what remains is dropped."""
        return [{"input_ids": block} for block in self._blocks([row["text"] for row in rows])]

    def _blocks(self, texts: list[str]) -> list[Tensor]:
        tokens = self.tokenizer(texts, verbose=False)["input_ids"]
        tokens = torch.tensor(list(itertools.chain.from_iterable(tokens)))
        return list(tokens[: len(tokens) // self.block_size * self.block_size].view(-1, self.block_size))

    def _demo_examples(self, split):
        """Blocks of each topic by itself, so that a block has one topic; every eighth is held out."""
        return [
            {"input_ids": block, "topic": topic}
            for topic, text in sorted(demo_corpus().items())
            for number, block in enumerate(self._blocks([text]))
            if (number % HELD_OUT == HELD_OUT - 1) == (split == "validation")
        ]

    def collate(self, examples):
        return {"input_ids": torch.stack([example["input_ids"] for example in examples])}

    def describe(self, example):
        return self.tokenizer.decode(example["input_ids"]).strip()

    def topic(self, example):
        return example.get("topic")

    # ----------------------------------------------------------------------------------------------------- losses

    def train_loss(self, model, batch, sample_labels=None):
        tokens = batch["input_ids"]
        uniforms = None
        if sample_labels is not None:
            uniforms = sample_labels.uniforms(batch[EXAMPLE_INDEX], tokens.shape[1] - 1)
        return self.next_token_loss(model, tokens, tokens[:, 1:], uniforms)

    @staticmethod
    def next_token_loss(model, tokens, labels, uniforms=None) -> Tensor:
        """Summed cross-entropy of each position against labels [examples, positions - 1], given or sampled."""
        hidden = model.transformer(tokens, use_cache=False).last_hidden_state[:, :-1]
        return linear_cross_entropy(hidden, model.lm_head.weight, labels, uniforms)

    def measurement(self, model, batch):
        return self.train_loss(model, batch)

    def training_loss(self, model, batch):
        # Through model(…), which may be wrapped for several processes; it makes the logits of one position at least.
        tokens = batch["input_ids"]
        output = model(tokens, output_hidden_states=True, logits_to_keep=1, use_cache=False)
        head = getattr(model, "module", model).lm_head
        return (
            linear_cross_entropy(output.hidden_states[-1][:, :-1], head.weight, tokens[:, 1:]) / tokens[:, 1:].numel()
        )

    @torch.no_grad()
    def evaluation_values(self, model, batch):
        tokens = batch["input_ids"]
        hidden = model.transformer(tokens, use_cache=False).last_hidden_state[:, :-1]
        head = model.lm_head.weight
        losses = [linear_cross_entropy(states, head, labels) for states, labels in zip(hidden, tokens[:, 1:])]
        losses = torch.stack(losses).double()
        return {MEASUREMENT: losses, "positions": torch.full_like(losses, tokens.shape[1] - 1)}

    def metrics(self, values):
        return {"perplexity": float((values[MEASUREMENT].sum() / values["positions"].sum()).exp())}

    def query_metrics(self, values):
        return {"mean query perplexity": float((values[MEASUREMENT] / values["positions"]).exp().mean())}
