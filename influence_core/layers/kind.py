"""What a kind of tracked layer has to say of itself; all else takes it by this alone.

Whatever its parameters are, they are seen as one matrix [out, in(+1)]: a weight [out, in] and, where there is one, a
bias as the last column. Flattened for products with other gradients, a gradient is held by its parts, the weight's
out*in numbers, row by row, and the bias's out numbers: side by side in one row they would keep the product that makes
them from writing in one go, and a column more would turn 768 into 769, which matrix units take slowly.

Legend: n = examples, t = positions, o = out, i = in.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from influence_core.captured import Calls, Captured, Layout, Spans


@dataclass(frozen=True)
class SiteProducts:
    """What each position of one example, at one site, adds to the products of its gradient with some directions."""

    site: str
    products: Tensor  # [directions, positions]
    spans: Spans = ()  # how the positions lie; empty: one call


def forward_with(module: nn.Module, parameters: Mapping[str, Tensor], *arguments: Any, **keywords: Any) -> Any:
    """What the module computes with other numbers in the place of its own parameters; without its hooks."""
    held = dict(module._parameters)
    try:
        module._parameters.update({name: nn.Parameter(x, requires_grad=False) for name, x in parameters.items()})
        return module.forward(*arguments, **keywords)
    finally:
        module._parameters.update(held)


Parts = tuple[Tensor, ...]  # gradients flattened, [examples, numbers]: of the weight; of the bias, where there is one


@dataclass(frozen=True)
class TrackedLayer(ABC):
    """Parameters that the influence is taken over, seen as one [out, in(+1)] matrix."""

    name: str
    in_features: int
    out_features: int
    has_bias: bool

    is_kronecker: ClassVar[bool] = False  # whether covariances of inputs and of output gradients make its Fisher
    is_spread: ClassVar[bool] = False  # whether what it gives all rows at once is taken apart by rows
    is_product: ClassVar[bool] = False  # whether half precision rounds what it multiplies

    # -------------------------------------------------------------------------------------------- what a kind says

    @property
    @abstractmethod
    def sites(self) -> Mapping[str, nn.Module]:
        """{name: module} of all whose calls make the gradient."""

    @property
    @abstractmethod
    def parameters(self) -> Sequence[nn.Parameter]:
        """The weight, and the bias where there is one."""

    @property
    def watched(self) -> Mapping[str, nn.Parameter]:
        """{site: weight} of heads whose losses are wanted, see `watched_heads`."""
        return {}

    def read(self, site: str, arguments: tuple, keywords: Mapping[str, Any]) -> Tensor:
        """What is kept of a call's input."""
        (seen,) = (*arguments, *keywords.values())  # handed over either way
        return seen

    @abstractmethod
    def capture(self, calls: Mapping[str, Calls], layout: Layout) -> Captured:
        """What is kept of a batch, from the calls at each site.

        Raises:
            UserError: it can't be told apart by example.
        """

    @abstractmethod
    def gradient_parts(self, captured: Captured, out: Parts | None = None) -> Parts:
        """Per-sample gradients, by parts: ([n, out*in], [n, out] where there is a bias), in the operands' dtype.

        Args:
            out: optional memory to write into, of n gradients.
        """

    @abstractmethod
    def parameter_gradient(self, parameter: nn.Parameter, captured: Captured) -> Tensor:
        """What the calls of all examples together add to a parameter's gradient, in its own layout."""

    @abstractmethod
    def products_by_position(self, captured: Captured, directions: Tensor) -> list[SiteProducts]:
        """<gradient, direction> of one example, split by where each part of the gradient comes from.

        Args:
            captured: of one example, all its positions.
            directions: [directions, out, in(+1)], in the dtype of the products.
        """

    @abstractmethod
    def gradient_flops(self, positions: Mapping[str, float]) -> float:
        """Of one example's gradient, from the positions that have a gradient at each site."""

    @property
    def label(self) -> str:
        """The name, as stored results know the layer."""
        return self.name

    @property
    def scratch_numbers(self) -> int:
        """Numbers at hand while a gradient is summed in more digits than products have."""
        return 0

    # ------------------------------------------------------------------------------------------------ what is shared

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in(+1))"""
        return self.out_features, self.in_features + self.has_bias

    @property
    def num_parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def num_covariances(self) -> int:
        """Numbers in its covariances, or their eigenvectors, where it has them."""
        return sum(size * size for size in self.shape) if self.is_kronecker else 0

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """Numbers in a gradient's parts: those of the weight, then those of the bias, where there is one."""
        weight = self.out_features * self.in_features
        return (weight, self.out_features) if self.has_bias else (weight,)

    def empty_parts(self, like: Tensor, *shape: int) -> Parts:
        """Memory for the parts of so many gradients, [*shape, numbers of a part] each."""
        return tuple(like.new_empty(*shape, size) for size in self.part_sizes)

    def matrix_gradients(self, captured: Captured) -> Tensor:
        """Per-sample gradients as matrices, [n, out, in(+1)]."""
        return self.to_matrix(self.gradient_parts(captured))

    def to_matrix(self, parts: Parts) -> Tensor:
        """Parts of n gradients -> [n, out, in(+1)]."""
        weight = parts[0].view(-1, self.out_features, self.in_features)
        return torch.cat([weight, parts[1].unsqueeze(-1)], dim=-1) if self.has_bias else weight

    def to_parts(self, matrix: Tensor) -> Parts:
        """[n, out, in(+1)] -> parts."""
        weight = matrix[..., : self.in_features].flatten(1)
        return (weight, matrix[..., -1]) if self.has_bias else (weight,)

    def store(self, matrix: Tensor, rows: Tensor | slice, into: Parts) -> None:
        """into[rows] = to_parts(matrix), without a copy between; `into`: of any number of gradients and any dtype."""
        o, i = self.out_features, self.in_features
        into[0].view(-1, o, i)[rows] = matrix[..., :i].to(into[0].dtype)
        if self.has_bias:
            into[1][rows] = matrix[..., i].to(into[1].dtype)
