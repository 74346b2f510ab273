"""Tiny random models of many architectures, and the ready tasks on random tokens."""

from types import SimpleNamespace

import torch
import transformers as hf

from influence_core.tasks.causal_lm import CausalLMTask
from influence_core.tasks.multiple_choice import MultipleChoiceTask
from influence_core.tasks.seq2seq import Seq2SeqTask
from influence_core.tasks.sequence_classification import SequenceClassificationTask

VOCABULARY, PAD, EOS, CLASSES, CHOICES = 48, 1, 2, 3, 3
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 12, "max_position_embeddings": 32, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 3,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 1}
ENCODER_DECODER = {
    "vocab_size": VOCABULARY, "d_model": 8, "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": EOS,
}  # fmt: skip
BART = ENCODER_DECODER | {
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 32, "forced_eos_token_id": None,
}  # fmt: skip
T5 = ENCODER_DECODER | {"d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "max_relative_positions": 16,
}

CAUSAL = {
    "GPT-2": hf.GPT2Config(vocab_size=VOCABULARY, n_embd=8, n_layer=2, n_head=2, n_positions=32),
    "Llama": hf.LlamaConfig(**GROUPED),
    "Qwen2": hf.Qwen2Config(**GROUPED),
    "Qwen3": hf.Qwen3Config(**GROUPED, head_dim=4),
    "Pythia": hf.GPTNeoXConfig(**SIZES),
    "Phi-3": hf.Phi3Config(**GROUPED),
    "Phi (head with a bias)": hf.PhiConfig(**SIZES),
    "Gemma-2 (soft cap)": hf.Gemma2Config(**GROUPED, head_dim=4, final_logit_softcapping=2.0),
    "Granite (scaled logits)": hf.GraniteConfig(**GROUPED, logits_scaling=3.0),
    "OPT": hf.OPTConfig(**SIZES, ffn_dim=12, word_embed_proj_dim=8),
    "BLOOM": hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=8, n_layer=2, n_head=2),
    "GPT-Neo": hf.GPTNeoConfig(vocab_size=VOCABULARY, hidden_size=8, num_layers=2, num_heads=2,
                               attention_types=[[["global", "local"], 1]], max_position_embeddings=32),
    "Mixtral (experts)": hf.MixtralConfig(**GROUPED, num_local_experts=4),
    "Qwen2-MoE (flattened shared expert)": hf.Qwen2MoeConfig(
        **GROUPED, num_experts=4, moe_intermediate_size=6, shared_expert_intermediate_size=10, num_experts_per_tok=2),
}  # fmt: skip
ENCODERS = {
    "BERT": hf.BertConfig(**SIZES),
    "RoBERTa": hf.RobertaConfig(**SIZES),
    "DistilBERT": hf.DistilBertConfig(vocab_size=VOCABULARY, dim=8, n_layers=2, n_heads=2, hidden_dim=12,
                                      max_position_embeddings=32, pad_token_id=PAD),
    "ModernBERT": hf.ModernBertConfig(**SIZES, cls_token_id=3, sep_token_id=EOS),
    "DeBERTa-v3": hf.DebertaV2Config(**SIZES, **DEBERTA, share_att_key=True, norm_rel_ebd="layer_norm"),
    "DeBERTa-v2 (own position layers)": hf.DebertaV2Config(**SIZES, **DEBERTA, share_att_key=False),
    "ELECTRA": hf.ElectraConfig(**SIZES, embedding_size=6),
    "ALBERT (one block, called twice)": hf.AlbertConfig(**SIZES, embedding_size=6),
}  # fmt: skip
ONLY_CLASSIFIERS = {"GPT-2": CAUSAL["GPT-2"], "Llama": CAUSAL["Llama"], "BART": hf.BartConfig(**BART)}
ENCODER_DECODERS = {
    "T5": hf.T5Config(**T5),
    "T5 (gated, untied)": hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "BART": hf.BartConfig(**BART),
    "Marian": hf.MarianConfig(**BART),
    "Pegasus": hf.PegasusConfig(**BART),
    "Switch (experts by layer)": hf.SwitchTransformersConfig(
        **T5, num_decoder_layers=1, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4
    ),
    "M2M-100 (shifts labels itself)": hf.M2M100Config(**BART),
}

# Computed in float32 inside, whatever the model's own format: a norm, a softmax or a table of positions.
PARTLY_FLOAT32 = {
    "Llama", "Qwen2", "Qwen3", "Phi-3", "Gemma-2 (soft cap)", "Granite (scaled logits)", "GPT-Neo", "BLOOM",
    "Mixtral (experts)", "Qwen2-MoE (flattened shared expert)", "Switch (experts by layer)",
}  # fmt: skip
# In float64 what these add to a masked score is infinite in float32, where they take the softmax: padding on the left,
# that sees nothing but itself, is then NaN.
NO_PADDING_ON_THE_LEFT = {"Gemma-2 (soft cap)", "BLOOM"}


def make_model(auto_model, config, **changes):
    """In float64, its parameters moved away from zeros and ones."""
    config = type(config)(**{**config.to_dict(), **changes})
    # The product that experts are fused for has no float64 on a CPU.
    options = {"experts_implementation": "eager"} if hasattr(config, "num_experts_per_tok") else {}
    torch.manual_seed(0)
    model = auto_model.from_config(config, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class RandomTokens:
    """Examples of random tokens and lengths, in place of a dataset; a tokenizer that only knows how to pad."""

    name = "random_tokens"
    num_train, num_queries = 16, 3
    longest = 9

    def __init__(self):
        self.tokenizer = SimpleNamespace(pad_token_id=PAD)
        self.block_size = self.max_length = self.max_source_length = self.max_target_length = self.longest
        self.joins_rows = False

    def load_dataset(self, split, indices=None):
        generator = torch.Generator().manual_seed({"train": 1, "validation": 2}[split])
        number = {"train": self.num_train, "validation": self.num_queries}[split]

        def draw(shape, low=4, high=VOCABULARY):
            return torch.randint(low, high, shape, generator=generator)

        examples = [self.example(draw) for _ in range(number)]
        return examples if indices is None else [examples[index] for index in indices]

    def row(self, draw):
        """Tokens of one length of several, the last one the end's."""
        length = int(draw((), 3, self.longest + 1))
        return torch.cat([draw((length - 1,)), torch.tensor([EOS])])


class RandomCausal(RandomTokens, CausalLMTask):
    kind = "causal"

    def example(self, draw):
        return {"input_ids": self.row(draw)}


class RandomCausalFromTheLeft(RandomCausal):
    """A collate of one's own."""

    kind = "causal, padded on the left"

    def collate(self, examples):
        batch = super().collate(examples)
        turned = super().collate([{"input_ids": torch.as_tensor(example["input_ids"]).flip(0)} for example in examples])
        return batch | {key: x.flip(1) for key, x in turned.items()}


class RandomClasses(RandomTokens, SequenceClassificationTask):
    kind = "classification"

    def example(self, draw):
        return {"input_ids": self.row(draw), "label": int(draw((), 0, CLASSES))}


class RandomChoices(RandomTokens, MultipleChoiceTask):
    kind, endings = "multiple choice", ("a", "b", "c")

    def choices(self, row):
        raise NotImplementedError

    def example(self, draw):
        return {"input_ids": [self.row(draw) for _ in range(CHOICES)], "label": int(draw((), 0, CHOICES))}


class RandomPairs(RandomTokens, Seq2SeqTask):
    kind = "sequence to sequence"

    def source_and_target(self, row):
        raise NotImplementedError

    def example(self, draw):
        return {"input_ids": self.row(draw), "labels": self.row(draw)}
