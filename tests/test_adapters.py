"""LoRA: scores over the adapters' matrices against plain autograd, and which of their layers are tracked."""

import peft
import pytest
import torch
import transformers as hf

from influence_core.fingerprints import model_fingerprint
from influence_core.runtime import Runtime
from influence_core.study import Study
from influence_core.tasks.adapters import Lora, adapted_model, add_adapter
from influence_core.tasks.tracking import coverage_notes
from tests import models
from tests.studies import score
from tests.test_any_model import dense_scores
from tests.test_exactness import FLOAT64, SEED, relative_error

CLASSIFIER = ["classifier.weight", "classifier.bias"]
# Task, model, its rank, the layers that get an adapter, new weights, and how many layers are trained.
CASES = {
    "GPT-2, its fused layer, rank 1": (models.RandomCausal, hf.AutoModelForCausalLM, "GPT-2", 1, ["c_attn"], [], 4),
    "GPT-2, several": (models.RandomCausal, hf.AutoModelForCausalLM, "GPT-2", 3, ["c_attn", "c_fc", "c_proj"], [], 16),
    "Llama": (models.RandomCausal, hf.AutoModelForCausalLM, "Llama", 2, ["all-linear"], [], 28),
    "BERT and its new head": (
        models.RandomClasses, hf.AutoModelForSequenceClassification, "BERT", 2, ["query", "value"], CLASSIFIER, 9),
    "RoBERTa by choices": (
        models.RandomChoices, hf.AutoModelForMultipleChoice, "RoBERTa", 1, ["all-linear"], CLASSIFIER, 27),
    "T5": (models.RandomPairs, hf.AutoModelForSeq2SeqLM, "T5", 2, None, [], 12),
    "BART": (models.RandomPairs, hf.AutoModelForSeq2SeqLM, "BART", 2, ["q_proj", "fc1"], [], 10),
}  # fmt: skip
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def adapted(auto_model, name, rank, targets, new_weights, **changes):
    """The model in float64 with an adapter that is no longer new: neither of its matrices is zero."""
    configs = models.CAUSAL | models.ENCODERS | models.ENCODER_DECODERS
    model = models.make_model(auto_model, configs[name], **changes)
    model = add_adapter(model, Lora(rank, None, targets), new_weights).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


SLOW = {"Llama", "RoBERTa by choices"}


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES])
def test_scores_over_adapters_are_those_of_single_examples(case, tmp_path):
    """All that was trained is tracked, and nothing else: A, B and a new head."""
    task_class, auto_model, name, rank, targets, new_weights, num_layers = CASES[case]
    task = task_class()
    changes = {"num_labels": models.CLASSES} if task_class is models.RandomClasses else {}
    model = adapted(auto_model, name, rank, targets, new_weights, **changes)
    study = Study(task, model, task.load_dataset("train"), tmp_path, Runtime(precision=FLOAT64, seed=SEED))
    tracked = {id(x) for layer in study.layers for x in layer.module.parameters(recurse=False)}
    assert tracked == {id(x) for x in model.parameters() if x.requires_grad} and len(study.layers) == num_layers
    assert coverage_notes(task, model, study.layers, was_asked=False) == []
    scores = score(study, ["identity", "ekfac"], query_batch_size=2, train_batch_size=7)
    expected = dense_scores(task, model, study.layers)
    bound = 1e-5 if name in models.PARTLY_FLOAT32 else 1e-9
    for strategy in ("identity", "ekfac"):
        assert relative_error(scores[strategy], expected[strategy]) < bound, strategy


def test_a_peft_model_itself_can_be_studied(tmp_path):
    """As somebody has it who made it with peft: what is around it hides its arguments."""
    model = adapted(hf.AutoModelForCausalLM, "GPT-2", 2, ["c_attn"], [])
    task = models.RandomCausal()
    expected = score(
        Study(task, model, task.load_dataset("train"), tmp_path / "a", Runtime(precision=FLOAT64)), ["identity"]
    )
    task, whole = models.RandomCausal(), model._adapted
    assert all(name.startswith("base_model.model.") for name in task.tracked_layer_names(whole))
    scores = score(
        Study(task, whole, task.load_dataset("train"), tmp_path / "b", Runtime(precision=FLOAT64)), ["identity"]
    )
    assert relative_error(scores["identity"], expected["identity"]) < 1e-12


def test_adapters_of_other_scales_are_other_models():
    """Though all their tensors are the same: no scores, and no retraining, of one are the other's."""
    found = set()
    for alpha in (None, 3, 400):
        model = models.make_model(hf.AutoModelForCausalLM, models.CAUSAL["GPT-2"])
        torch.manual_seed(1)
        found.add(model_fingerprint(add_adapter(model, Lora(2, alpha, ["c_attn"]), [])))
    assert len(found) == 3


def test_a_trained_copy_of_the_head_is_a_head():
    """It is not tracked, nor is an adapter on it: their covariances would be as large as the vocabulary."""
    task = models.RandomCausal()
    for config in (
        peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),
    ):
        whole = peft.get_peft_model(models.make_model(hf.AutoModelForCausalLM, models.CAUSAL["Llama"]), config)
        names = task.tracked_layer_names(whole.get_base_model())
        assert len(names) == 4 and all("q_proj.lora_" in name for name in names)


def test_a_classifier_s_adapter_made_by_peft(tmp_path):
    """RoBERTa's head is several layers, saved as one; peft's own choice of names for it."""
    config = hf.RobertaConfig(**BERT, vocab_size=48, max_position_embeddings=40)
    hf.RobertaModel(config).save_pretrained(tmp_path / "base")
    auto = hf.AutoModelForSequenceClassification
    base = auto.from_pretrained(tmp_path / "base", num_labels=3)
    whole = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    whole.save_pretrained(tmp_path / "adapter")

    def adapt(config, is_start):
        config.num_labels = 3

    loaded = [adapted_model(auto, str(tmp_path / "adapter"), None, None, adapt, False).eval() for _ in range(2)]
    tokens = {"input_ids": torch.arange(9)[None]}
    torch.testing.assert_close(loaded[0](**tokens).logits, whole.eval()(**tokens).logits)
    assert model_fingerprint(loaded[0]) == model_fingerprint(loaded[1])
