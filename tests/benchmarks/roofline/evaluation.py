"""What train.py's evaluation takes on a modelled card: the loss of every training and validation sequence."""

from unittest.mock import patch

import torch

from influence_core.experiments.accelerators import OneDevice
from influence_core.experiments.fitting import evaluate
from influence_core.tasks.language_model import LanguageModelTask
from tests.benchmarks.roofline.analysis import Size, beginning, make_task, modelled, once_by_shapes
from tests.benchmarks.roofline.cards import Card
from tests.benchmarks.roofline.clock import Clock
from tests.benchmarks.roofline.device import ModelledDevice


def model_evaluation(card: Card, precision: str, size: Size) -> Clock:
    """Evaluate both splits as experiments/training.py does: under "bf16", the model's own forward pass in autocast."""
    task, model = make_task(size)
    clock = Clock()
    device = ModelledDevice(card, clock)
    with modelled(device, card, model):
        half = precision == "bf16"
        accelerator = OneDevice(torch.device("cuda:0"), half)
        model = model.to(accelerator.device)
        if half:  # as accelerate wraps it
            model.forward = torch.autocast("cuda", torch.bfloat16)(model.forward)
        once = once_by_shapes(LanguageModelTask.evaluation_values, clock, gives=True)
        with patch.object(LanguageModelTask, "evaluation_values", once):
            beginning(clock)
            for split in ("train", "validation"):
                with clock.during(stage=f"Evaluate {split}"), accelerator.autocast():
                    evaluate(task, model, task.load_dataset(split), size.eval_batch_size, accelerator)
    return clock
