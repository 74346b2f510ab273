"""Sharded models that go round the calls of their units, or whose calls depend on what they are given."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers as hf
from torch import nn

from influence_core.analysis import analyze
from influence_core.errors import UserError
from influence_core.experiments.accelerators import OneDevice
from influence_core.experiments.fitting import Recipe, fit
from influence_core.lockstep import NUM_SINGLE, of_many_sizes
from influence_core.losses import cross_entropy
from influence_core.runtime import Runtime
from influence_core.sharded_units import repeated_blocks, sharded_units
from influence_core.sharding import process_mesh, shard_model
from influence_core.study import Study
from influence_core.task import EXAMPLE_INDEX
from tests.models import BART, EOS, PAD, SIZES, RandomCausal, RandomClasses, RandomPairs, make_model
from tests.studies import STRATEGIES
from tests.test_exactness import DAMPING, FLOAT64, SEED, relative_error
from tests.test_processes import run_processes
from tests.tiny import PAD as NO_LABEL
from tests.tiny import VOCABULARY, TinyTask

WIDTH, LONGEST = 4, 12
BATCHES = {"query_batch_size": 2, "train_batch_size": 3, "factor_batch_size": 4}


class Latents(nn.Module):
    """Hands on a view of its parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, WIDTH))

    def forward(self, x):
        return self.weight.expand(len(x), -1, -1)


class Block(nn.Module):
    """A layer of it reads a view of a parameter; another one a view that does not tell."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2, WIDTH))
        self.read, self.read_again, self.mix = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        read = self.read(self.queries.expand(len(x), -1, -1))
        read = read + self.read_again(self.queries.detach().expand(len(x), -1, -1))
        return x + torch.tanh(self.mix(x)) * read.mean(1, keepdim=True)


class Steps(nn.Sequential):
    """Takes itself apart."""

    def forward(self, x):
        for layer in (*self[:1], *self[1:]):
            x = layer(x)
        return x


class Predictions(nn.Module):
    """Has a bias together with a module inside it, which has its weight together with one outside."""

    def __init__(self, weight):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(VOCABULARY))
        self.transform, self.decoder = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.decoder.weight, self.decoder.bias = weight, self.bias

    def forward(self, x):
        return self.decoder(torch.tanh(self.transform(x)))


class RoundAbout(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.spare, self.latents, self.look = nn.Embedding(2, WIDTH), Latents(), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([nn.ModuleList([Block(), Block()]), nn.ModuleDict({"last": Block()})])
        self.norm, self.predictions = nn.LayerNorm(WIDTH), Predictions(self.embedding.weight)
        self.steps = nn.ModuleList([Steps(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))])
        self.again = nn.Linear(WIDTH, WIDTH, bias=False)
        self.again.weight = self.steps[0][0].weight  # of a block, and of a module outside

    def get_output_embeddings(self):
        return self.predictions.decoder

    def forward(self, tokens, mask):
        x = self.embedding(tokens)
        x *= 1.5  # in place: the forward pass begins again
        x = (x + self.positions.weight[: x.shape[1]]) * mask.unsqueeze(-1)  # a table that is not called
        x = x + self.look(self.latents(x)).mean(1, keepdim=True)
        for block in [*self.blocks[0], self.blocks[1]["last"]]:
            x = block.forward(x)  # which no hook sees
        x = x + self.again(x.to(self.positions.weight.dtype))
        x = x + self.steps[0](x)
        return self.predictions(self.norm(x))


class RoundAboutTask(TinyTask):
    def load_model(self, checkpoint_dir=None):
        torch.manual_seed(3)
        return RoundAbout().eval()

    def tracked_layer_names(self, model):
        kinds = (nn.Linear, nn.LayerNorm)
        names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
        return [
            "embedding",
            *(name for name in names if not any(part in name for part in ("decoder", "again", "steps.0.0"))),
        ]

    def position_mask(self, batch, layer_name):
        is_of_tokens = not any(part in layer_name for part in ("read", "look"))
        return super().position_mask(batch, layer_name) if is_of_tokens else None

    def train_loss(self, model, batch, sample_labels=None):
        labels, uniforms = batch["labels"], None
        if sample_labels is not None:
            uniforms = sample_labels.uniforms(batch[EXAMPLE_INDEX], labels.shape[1])
        return cross_entropy(model(batch["tokens"], labels != NO_LABEL), labels, uniforms)


def scores_of(task, model, directory, runtime):
    if runtime.sharded:
        shard_model(model, process_mesh("cpu"))
    study = Study(task, model, task.load_dataset("train")[:16], directory, runtime)
    return analyze(study, STRATEGIES, task.load_dataset("validation"), damping=DAMPING, **BATCHES)


FAMILIES = {  # of transformers: (task, auto model, config), each of which does one of these things
    "a table of positions read": (RandomClasses, hf.DebertaConfig(
        **SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=16)),
    "latents": (RandomClasses, hf.PerceiverConfig(
        vocab_size=48, d_latents=8, d_model=8, num_latents=4, num_blocks=1, num_self_attends_per_block=1,
        num_self_attention_heads=2, num_cross_attention_heads=2, qk_channels=8, v_channels=8,
        max_position_embeddings=32)),
    "forward called": (RandomClasses, hf.SqueezeBertConfig(
        **SIZES, embedding_size=8, q_groups=1, k_groups=1, v_groups=1, post_attention_groups=1,
        intermediate_groups=1, output_groups=1)),
    "lists of lists": (RandomClasses, hf.FunnelConfig(
        vocab_size=48, d_model=8, n_head=2, d_head=4, d_inner=12, block_sizes=[1, 1], pad_token_id=PAD)),
    "a bias in two modules": (RandomCausal, hf.BertConfig(**SIZES, is_decoder=True)),
    "changed in place": (RandomCausal, hf.CTRLConfig(
        vocab_size=48, n_embd=8, n_layer=2, n_head=2, n_positions=32, dff=12, pad_token_id=PAD, eos_token_id=EOS)),
}  # fmt: skip
AUTO = {
    RandomClasses: hf.AutoModelForSequenceClassification,
    RandomCausal: hf.AutoModelForCausalLM,
    RandomPairs: hf.AutoModelForSeq2SeqLM,
}


def scores_of_all(directory, runtime):
    """{model: {strategy: scores}}"""
    runtime = replace(runtime, sharded=runtime.world_size > 1)
    task = RoundAboutTask()
    found = {"own": scores_of(task, task.load_model().double(), directory / f"own {runtime.world_size}", runtime)}
    for name, (make_task, config) in FAMILIES.items():
        task, changes = make_task(), {"num_labels": 3} if make_task is RandomClasses else {}
        task.tracked_kinds = "all"
        model = make_model(AUTO[make_task], config, **changes)
        found[name] = scores_of(task, model, directory / f"{name} {runtime.world_size}", runtime)
    return found


@pytest.mark.slow
def test_models_that_go_round_their_units(tmp_path):
    """The scores of one process, of all that can be tracked."""
    expected = scores_of_all(tmp_path, Runtime(precision=FLOAT64, seed=SEED))
    for found in run_processes(scores_of_all, 2, tmp_path):
        for name, strategy in itertools.product(expected, STRATEGIES):
            assert relative_error(found[name][strategy], expected[name][strategy]) < 1e-8, (name, strategy)


class Sharding(OneDevice):
    """What a training asks of accelerate, with parts of parameters."""

    def prepare_model(self, model):
        shard_model(model, process_mesh("cpu"))
        return model


def reads_for_padding(model, tokens, mask):
    if not mask.all():  # none of a single example
        model.spare.weight.sum()
    return RoundAbout.forward(model, tokens, mask)


def reads_a_block(model, tokens, mask):
    return RoundAbout.forward(model, tokens, mask) * model.blocks[0][0].mix.weight[0, 0]


def refusals(directory, runtime):
    """What depends on the length (LED calls its embedding once more for padding), and on chance (dropped layers); what
    reads a parameter in the midst of a block, but not in its call."""
    task = RandomPairs()
    model = make_model(hf.AutoModelForSeq2SeqLM, LED).float()
    runtime = Runtime(seed=SEED, rank=runtime.rank, world_size=runtime.world_size, sharded=True)
    with pytest.raises(UserError, match=r"--use_fsdp: which parts of this LED.*\(led.encoder.embed_tokens\)"):
        scores_of(task, model, directory, runtime)
    own, runtime = RoundAboutTask(), replace(runtime, precision=FLOAT64)
    model = own.load_model().double()
    model.forward = partial(reads_a_block, model)
    with pytest.raises(UserError, match="the training loss of .* it reads parameters of a block outside"):
        scores_of(own, model, directory, runtime)
    model = own.load_model().double()
    model.forward = partial(reads_for_padding, model)
    with pytest.raises(UserError, match=r"--use_fsdp: which parts of this RoundAbout .*\(spare.weight\)"):
        scores_of(own, model, directory, runtime)
    model = make_model(hf.AutoModelForSeq2SeqLM, hf.BartConfig(**BART), encoder_layerdrop=0.5).float()
    arguments = task.load_dataset("train"), Recipe(1e-3, 0.0, 1, 4, False), 0, Sharding(torch.device("cpu"), False)
    with pytest.raises(UserError, match=r"--use_fsdp: which parts of this Bart.*\(model.encoder.layers.0\)"):
        fit(task, model, *arguments)
    state = torch.get_rng_state()
    model = make_model(hf.AutoModelForSeq2SeqLM, hf.BartConfig(**BART)).float()
    torch.set_rng_state(state)
    with pytest.raises(ZeroDivisionError):  # all else is well
        fit(task, model, *arguments, after_step=lambda *_: 1 // 0)
    return True


LED = hf.LEDConfig(**BART, max_encoder_position_embeddings=32, max_decoder_position_embeddings=32, attention_window=4)


def test_what_can_t_go_in_step_is_refused(tmp_path):
    assert run_processes(refusals, 2, tmp_path) == [True, True]


def test_a_few_examples_of_many_sizes():
    """From the smallest to the largest, always as many, for what depends on chance; then these two together."""
    assert of_many_sizes({4: 7}) == [[4]] * (NUM_SINGLE + 1)
    assert of_many_sizes({4: 7, 5: 8}, largest=1)[-1] == [4]
    *single, together = of_many_sizes({0: 5, 1: 6, 2: 9, 3: 1})
    assert {index for (index,) in single} == {0, 1, 2, 3} and together == [3, 2] and len(single) == NUM_SINGLE
    *single, together = of_many_sizes({index: 1000 - index for index in range(100)})
    assert len({index for (index,) in single}) == NUM_SINGLE and together == [99, 0] == [single[0][0], single[-1][0]]


def test_what_lies_inside_comes_first():
    """Whatever the order: else it would be a part of the unit around it."""
    model = RoundAbout()
    assert len(repeated_blocks(model)) == 4
    units = sharded_units(model)
    together = [sorted(unit, key=[*model.modules()].index) for unit in units]
    assert [model.embedding, model.predictions, model.predictions.decoder] in together
    assert [model.steps[0], model.again] in together
    seen = set()
    for unit in units:
        of_unit = {id(x) for module in unit for x in module.parameters()} - seen
        assert {
            id(x) for module in unit for x in module.parameters(recurse=module in repeated_blocks(model))
        } == of_unit
        seen |= of_unit
    assert seen == {id(x) for x in model.parameters()}


def test_parameters_shared_crosswise_are_refused():
    """Each of two units would have to be sharded before the other."""
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(2, 2)])
    for name in ("one", "other"):
        outer = nn.Module()
        outer.own, outer.inner = nn.Parameter(torch.ones(1)), nn.Module()
        setattr(model, name, outer)
    model.one.inner.own, model.other.inner.own = model.other.own, model.one.own
    with pytest.raises(UserError, match="share parameters"):
        sharded_units(model)
