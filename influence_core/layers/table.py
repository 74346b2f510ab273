"""A table: rows by number, of an embedding; or of a head, that gives each row a logit; or of both, tied to each other.

An embedding adds the gradient of its output to the row that it looked up. A head adds (softmax - onehot)^T h to all
rows; where the loss never held its logits (losses.py), neither are they held here. What an example's lookups and its
head add is summed before anything is squared or preconditioned, as the chain rule wants: they are the same numbers.

The covariance of a head's outputs would be as large as the vocabulary squared: a table's Fisher is taken as diagonal.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from influence_core.captured import Calls, Captured, Layout, Positions, Spans, end_to_end, lay_out
from influence_core.errors import UserError
from influence_core.layers.kind import SiteProducts, TrackedLayer, forward_with
from influence_core.layers.matrix import products_with_matrices
from influence_core.losses import Head, HeadLoss, add_head_gradient, head_products
from influence_core.precision import active_precision
from influence_core.sharded_units import own_class
from influence_core.sharding import whole


@dataclass
class Lookups:
    """Of one embedding."""

    site: str
    ids: Tensor  # [n, t] numbers of rows
    gradients: Tensor  # [n, t, d] of what was looked up
    spans: Spans


@dataclass
class Rows(Captured):
    """What the sites of a table saw: each list is of several calls."""

    lookups: list[Lookups]
    logits: list[Positions]  # of heads whose logits were held
    losses: list[HeadLoss]  # of those whose logits were not: hidden [n, t, d], targets [n, t]

    def __len__(self):
        each = [lookups.ids for lookups in self.lookups] + self.logits + [loss.targets for loss in self.losses]
        return len(each[0])

    def __getitem__(self, rows):
        return Rows(
            [replace(x, ids=x.ids[rows], gradients=x.gradients[rows]) for x in self.lookups],
            [positions[rows] for positions in self.logits],
            [replace(loss, hidden=loss.hidden[rows], targets=loss.targets[rows]) for loss in self.losses],
        )

    def to(self, dtype):
        return Rows(
            [replace(x, gradients=x.gradients.to(dtype)) for x in self.lookups],
            [positions.to(dtype) for positions in self.logits],
            [replace(loss, hidden=loss.hidden.to(dtype)) for loss in self.losses],
        )

    def as_one(self):
        return Rows(
            [replace(x, ids=end_to_end(x.ids), gradients=end_to_end(x.gradients), spans=()) for x in self.lookups],
            [positions.as_one() for positions in self.logits],
            [replace(loss, hidden=end_to_end(loss.hidden), targets=end_to_end(loss.targets)) for loss in self.losses],
        )

    @property
    def inputs(self):
        return [positions.activations for positions in self.logits] + [loss.hidden for loss in self.losses]

    @property
    def gradients(self):
        held = [lookups.gradients for lookups in self.lookups] + [
            positions.output_gradients for positions in self.logits
        ]
        return held + [loss.weights() for loss in self.losses]

    @property
    def tensors(self):
        return [*super().tensors, *(lookups.ids for lookups in self.lookups), *(loss.targets for loss in self.losses)]


@dataclass(frozen=True)
class TableLayer(TrackedLayer):
    """The modules that share a weight [rows, d]: embeddings, and at most one head, whose bias may be a column more."""

    embeddings: dict[str, nn.Embedding] = field(default_factory=dict)
    heads: dict[str, nn.Linear] = field(default_factory=dict)

    is_spread: ClassVar[bool] = True

    @classmethod
    def of(cls, name: str, embeddings: dict[str, nn.Embedding], heads: dict[str, nn.Linear]) -> "TableLayer":
        """The table of these modules, which all have the same weight.

        Raises:
            UserError: they are of no such kind, or more is shared than that weight.
        """
        modules = {**embeddings, **heads}
        weight = next(iter(modules.values())).weight
        for site, module in embeddings.items():
            if module.max_norm is not None or module.scale_grad_by_freq:
                raise UserError(f"layer {site} changes its rows or their gradients where it looks them up: it can't be "
                                "tracked")  # fmt: skip
        for site, module in heads.items():
            if own_class(module) is not nn.Linear:
                raise UserError(
                    f"layer {site} is a {own_class(module).__name__}: only an nn.Linear can be a table's head"
                )
        biases = [module.bias for module in heads.values() if module.bias is not None]
        if len(heads) > 1:
            raise UserError(f"layers {' and '.join(heads)} share their weight (tied weights): it can't be tracked")
        return cls(name, weight.shape[1], weight.shape[0], bool(biases), embeddings, heads)

    @property
    def label(self):
        return f"{self.name} (table)"

    @property
    def scratch_numbers(self):
        """A gradient's sum, and a product that is added to it."""
        return 2 * self.num_parameters

    @property
    def sites(self):
        return {**self.embeddings, **self.heads}

    @property
    def parameters(self):
        modules = list(self.sites.values())
        return [modules[0].weight, *([modules[-1].bias] if self.has_bias else [])]

    @property
    def watched(self):
        return {site: module.weight for site, module in self.heads.items()}

    def read(self, site, arguments, keywords):
        """The numbers of rows; of an embedding that makes them or scales what it looks up [..., 2], with the scale."""
        module = self.embeddings.get(site)
        if module is None or own_class(module) is nn.Embedding:
            return super().read(site, arguments, keywords)
        return _asked(module, arguments, keywords)

    def capture(self, calls, layout):
        lookups, logits, losses = [], [], []
        for site, of_module in calls.items():
            losses += [_laid_out(self.name, loss, layout) for loss in of_module.losses]
            if site in self.embeddings:
                lookups.append(self._lookups(site, of_module, layout))
            elif _is_used(of_module):
                logits.append(lay_out(self.name, of_module.to(layout.operand), None, layout))
        return Rows(lookups, logits, losses)

    def _lookups(self, site: str, calls: Calls, layout: Layout) -> Lookups:
        numbers, gradients, padding = [], [], self.embeddings[site].padding_idx
        for ids, gradient in zip(calls.inputs, calls.output_gradients):
            if ids.is_floating_point():
                ids, gradient = self._found(ids[..., 0]), gradient * ids[..., 1:].to(gradient.dtype)
            numbers.append(ids.unsqueeze(-1))
            gradients.append(layout.operand(gradient))
        laid_out = lay_out(self.name, Calls(numbers, gradients), None, layout)
        ids, gradients = laid_out.activations.squeeze(-1), laid_out.output_gradients
        if padding is not None:  # torch gives that row no gradient
            gradients = gradients.masked_fill((ids == padding).unsqueeze(-1), 0)
        return Lookups(site, ids, gradients, laid_out.spans)

    def _found(self, numbers: Tensor) -> Tensor:
        """The numbers of rows that an embedding told of, see `_asked`."""
        ids = numbers.round()
        if not bool(((ids - numbers).abs() < 1e-3).all() & (ids >= 0).all() & (ids < self.out_features).all()):
            raise UserError(f"layer {self.name} makes something else of its rows than to look them up and scale them: "
                            "it can't be tracked")  # fmt: skip
        return ids.long()

    def gradient_parts(self, captured: Rows, out=None):
        """Cost: of a head 2 t d v FLOPs, and as many again where its logits were not held."""
        n = len(captured)
        out = self.empty_parts(captured.tensors[0], n) if out is None else out
        sum_dtype = torch.promote_types(out[0].dtype, torch.float32)
        weight = whole(self.parameters[0]).detach() if captured.losses else None
        heads = [Head(weight, loss.precision) for loss in captured.losses]  # of each loss
        for row in range(n):  # one at a time, as the logits of a batch are never held
            of_example = [part[row] for part in out]
            sums = [part.zero_() if part.dtype == sum_dtype else torch.zeros_like(part, dtype=sum_dtype)
                    for part in of_example]  # fmt: skip
            self._add_gradient(captured[row : row + 1], heads, *sums)
            for part, total in zip(of_example, sums):
                if total is not part:  # rounded once
                    part.copy_(total)
        return out

    def _add_gradient(self, one: Rows, heads: list[Head], weight: Tensor, bias: Tensor | None = None) -> None:
        """Add that of one example to sums [v * d] and, where there is a bias, [v]."""
        weight = weight.view(self.out_features, self.in_features)
        for positions in one.logits:
            (hidden,), (gradients,) = positions.activations, positions.output_gradients
            active_precision(hidden).add_matmul(weight, gradients.t(), hidden)
            if bias is not None:
                bias += gradients.sum(0, dtype=bias.dtype)
        for loss, head in zip(one.losses, heads):
            add_head_gradient(replace(loss, hidden=loss.hidden[0], targets=loss.targets[0]), head, weight)
        for lookups in one.lookups:
            weight.index_add_(0, lookups.ids[0], lookups.gradients[0].to(weight.dtype))

    def parameter_gradient(self, parameter, captured: Rows):
        part = 0 if parameter is self.parameters[0] else 1
        each = (self.gradient_parts(captured[row : row + 1])[part] for row in range(len(captured)))
        return sum(each).view(parameter.shape)

    def products_by_position(self, captured: Rows, directions):
        """Cost: of a head 2 t d v FLOPs a direction, and as many for its logits."""
        products, (head,) = [], self.heads or ("",)
        for positions in captured.logits:
            products.append(products_with_matrices(head, positions, directions))
        for loss in captured.losses:
            one = replace(loss, hidden=loss.hidden[0], targets=loss.targets[0])
            of_weight = Head(whole(self.parameters[0]).detach(), loss.precision)
            products.append(SiteProducts(head, head_products(one, of_weight, directions[..., : self.in_features])))
        for lookups in captured.lookups:
            rows = directions[:, lookups.ids[0], : self.in_features]
            sums = (rows * lookups.gradients[0].to(directions.dtype)).sum(-1)
            products.append(SiteProducts(lookups.site, sums, lookups.spans))
        return products

    def gradient_flops(self, positions):
        of_heads = sum(positions.get(site, 0) for site in self.heads)
        return 4 * of_heads * self.num_parameters + self.num_parameters


@torch.compiler.disable
@torch.no_grad()
def _asked(module: nn.Embedding, arguments: tuple, keywords: Mapping[str, Any]) -> Tensor:
    """[..., 2]: which rows are looked up, and what they are multiplied by: what becomes of other rows tells."""
    num_rows, width = module.weight.shape
    ones = torch.ones(1, 1, dtype=torch.float64, device=module.weight.device)
    rows = torch.arange(num_rows, dtype=torch.float64, device=module.weight.device).unsqueeze(1)

    def looked_up(column: Tensor) -> Tensor:
        weight = {"weight": column.expand(num_rows, width)}
        return forward_with(module, weight, *arguments, **keywords)[..., 0].double()

    scale = looked_up(ones)
    numbers = looked_up(rows) / scale
    return torch.stack([numbers.masked_fill(scale == 0, 0), scale], -1)


def _laid_out(name: str, loss: HeadLoss, layout: Layout) -> HeadLoss:
    """With the rows of an example folded into its positions."""
    num_rows = len(loss.hidden) if layout.rows_per_example is None else layout.num_examples * layout.rows_per_example
    if loss.hidden.dim() != 3 or len(loss.hidden) != num_rows:
        raise UserError(
            f"the loss of the head {name} was given hidden states of shape {tuple(loss.hidden.shape)}, and must be "
            "given [rows, positions, d], so that they are told apart by example"
        )
    examples = len(loss.hidden) if layout.rows_per_example is None else layout.num_examples
    hidden, targets = (x.reshape(examples, -1, *x.shape[2:]) for x in (loss.hidden, loss.targets))
    return replace(loss, hidden=layout.operand(hidden), targets=targets, leaf=None)


def _is_used(calls: Calls) -> bool:
    """Whether a head made logits that the loss reads; not where a loss by chunks has no use for them."""
    return bool(calls.inputs) and (not calls.losses or any(bool(x.any()) for x in calls.output_gradients))
