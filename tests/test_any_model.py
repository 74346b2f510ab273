"""The ready tasks on a table of models: scores against plain autograd and the dense reference, example by example."""

import pytest
import torch
import transformers as hf
from torch.nn.functional import cross_entropy

from influence_core.runtime import Runtime
from influence_core.study import Study
from influence_core.task import EXAMPLE_INDEX
from tests import models, reference
from tests.models import CLASSES, make_model
from tests.studies import score
from tests.test_exactness import DAMPING, FLOAT64, SEED, relative_error

CASES = [
    *((models.RandomCausal, hf.AutoModelForCausalLM, name) for name in models.CAUSAL),
    *((models.RandomCausalFromTheLeft, hf.AutoModelForCausalLM, name)
      for name in models.CAUSAL if name not in models.NO_PADDING_ON_THE_LEFT),
    *((models.RandomClasses, hf.AutoModelForSequenceClassification, name)
      for name in (*models.ENCODERS, *models.ONLY_CLASSIFIERS)),
    *((models.RandomChoices, hf.AutoModelForMultipleChoice, name) for name in models.ENCODERS),
    *((models.RandomPairs, hf.AutoModelForSeq2SeqLM, name) for name in models.ENCODER_DECODERS),
]  # fmt: skip
CONFIGS = models.CAUSAL | models.ENCODERS | models.ENCODER_DECODERS | models.ONLY_CLASSIFIERS


def label(case):
    task_class, _, name = case
    return f"{task_class.kind} {name}"


def build(case):
    """(name, task, model, whether parts of it are float32)"""
    task_class, auto_model, name = case
    changes = {"num_labels": CLASSES, "pad_token_id": models.PAD} if task_class is models.RandomClasses else {}
    return name, task_class(), make_model(auto_model, CONFIGS[name], **changes), name in models.PARTLY_FLOAT32


# What `make test` leaves to `make test-slow`: near relatives, and the same models in a second kind of task.
RELATIVES = {
    "Qwen3", "Granite (scaled logits)", "OPT", "BLOOM", "GPT-Neo", "ELECTRA", "DeBERTa-v2 (own position layers)",
    "ALBERT (one block, called twice)", "Marian", "Pegasus",
}  # fmt: skip
BOTH_KINDS = {models.RandomCausalFromTheLeft: {"GPT-2", "Llama"}, models.RandomClasses: {"DistilBERT", "GPT-2", "BART"}}


def parameter(case):
    task_class, _, name = case
    is_slow = name in RELATIVES or name not in BOTH_KINDS.get(task_class, {name})
    return pytest.param(case, id=label(case), marks=pytest.mark.slow if is_slow else ())


@pytest.fixture(scope="module", params=map(parameter, CASES))
def case(request):
    return build(request.param)


def own_logits(task, model, example):
    """What the model says of one example without any padding: [targets, categories], and the data's own targets."""
    if isinstance(task, models.RandomCausal):
        tokens = example["input_ids"]
        return model(tokens[None]).logits[0, :-1], tokens[1:]
    if isinstance(task, models.RandomPairs):
        output = model(input_ids=example["input_ids"][None], labels=example["labels"][None])
        return output.logits[0], example["labels"]
    if isinstance(task, models.RandomChoices):
        # All rows of a question pass at once, so each by itself where they differ in length.
        rows = [model(input_ids=row[None, None]).logits[0] for row in example["input_ids"]]
        return torch.stack(rows, 1), torch.tensor([example["label"]])
    return model(input_ids=example["input_ids"][None]).logits, torch.tensor([example["label"]])


def own_loss(task, example, index=None):
    """Summed cross-entropy as a function of the model; with sampled labels where there is an index."""

    def of(model):
        logits, labels = own_logits(task, model, example)
        if index is not None:
            uniforms = [reference.uniform(SEED, index, position) for position in range(len(labels))]
            labels = torch.tensor([reference.sampled_label(row, u) for row, u in zip(logits, uniforms)])
        return cross_entropy(logits, labels, reduction="sum")

    return of


def own_measurement(task, example):
    def of(model):
        logits, labels = own_logits(task, model, example)
        others = torch.ones_like(logits).bool().scatter(1, labels[:, None], False)
        return (logits[others].logsumexp(-1) - logits[~others]).sum()

    is_choice = isinstance(task, (models.RandomChoices, models.RandomClasses))
    return of if is_choice else own_loss(task, example)


def gradients(model, layers, losses):
    """{layer: [examples, out, in(+1)]} by plain autograd, one example at a time."""
    found = {layer.name: [] for layer in layers}
    for loss in losses:
        model.zero_grad()
        loss(model).backward()
        for layer in layers:
            weight = layer.module.weight.grad
            weight = weight.T if isinstance(layer.module, hf.pytorch_utils.Conv1D) else weight
            parts = [weight] + ([layer.module.bias.grad[:, None]] if layer.has_bias else [])
            found[layer.name].append(torch.cat(parts, 1).clone())
    model.zero_grad()
    return {name: torch.stack(each) for name, each in found.items()}


def dense_scores(task, model, layers):
    """{strategy: [queries, train]}"""
    train, queries = task.load_dataset("train"), task.load_dataset("validation")
    fisher_losses = [own_loss(task, example, index) for index, example in enumerate(train)]
    of_fisher, of_train, of_queries = (
        gradients(model, layers, losses)
        for losses in (fisher_losses, [own_loss(task, x) for x in train], [own_measurement(task, x) for x in queries])
    )
    every = [torch.ones(1000, dtype=torch.bool)] * len(train)
    total = {"identity": 0, "ekfac": 0}
    for name in of_train:
        covariances = reference.covariances(model, name, fisher_losses, every)
        for strategy in total:
            fisher = reference.approximate_fisher(strategy, of_fisher[name], *covariances)
            scores = reference.scores(strategy, fisher, DAMPING, of_queries[name], of_train[name])
            total[strategy] = total[strategy] + scores
    return total


def test_scores_are_those_of_single_unpadded_examples(case, tmp_path):
    """Identity and EKFAC over everything that is tracked by default, whatever the model is made of."""
    name, task, model, is_partly_float32 = case
    study = Study(task, model, task.load_dataset("train"), tmp_path, Runtime(precision=FLOAT64, seed=SEED))
    sizes = {"query_batch_size": 2, "train_batch_size": 7, "factor_batch_size": 8}
    scores = score(study, ["identity", "ekfac"], **sizes)
    for strategy, expected in dense_scores(task, model, study.layers).items():
        assert relative_error(scores[strategy], expected) < (1e-5 if is_partly_float32 else 1e-9), strategy


def test_the_training_loss_is_the_model_s_own(case):
    """Its mean over a padded batch, with the labels that the task gives it."""
    _, task, model, _ = case
    task.observe(model)
    batch = task.collate(task.load_dataset("train")[:5]) | {EXAMPLE_INDEX: torch.arange(5)}
    expected = model(**task.model_inputs(model, batch) | {"labels": task.labels(batch)}).loss
    assert float(task.training_loss(model, batch)) == pytest.approx(float(expected), rel=1e-6)
