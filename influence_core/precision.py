"""Which number formats are used where: the one place that decides it.

float32:  model, products and sums in float32.
TF32:     as float32, but all products of a GPU, those of covariances and rotations too, see 10 bits of each operand's
          23 (--use_tf32; not on a CPU).
bfloat16: operands of products (model, per-sample gradients, scores) rounded to bfloat16, products accumulated in
          float32; the residual stream, losses, covariances, eigenvectors, Lambda, preconditioning and scores stay
          float32 (eigh in float64 always). Rotations of the queries' gradients, which are rounded to bfloat16
          afterwards, are TF32's on a GPU.
float64:  everything in float64, for tests.

On a GPU the model runs under autocast. On a CPU (where most multiply bfloat16 hundreds of times slower than float32) it
is emulated: inputs, weights and outputs of the tracked layers and of a head that is a matrix, and the operands of the
influence products, are rounded to bfloat16 and multiplied in float32, which is what matrix units compute. It saves no
time there; it shows what half precision does to the numbers.
"""

import contextlib
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_core.errors import UserError
from influence_core.memory import in_halves, slices

FEW, SUMMED_AT_ONCE = 4, 1 << 14  # rows or columns of a product; numbers of each


@dataclass(frozen=True)
class Precision:
    """dtypes of product operands and of sums.

    `emulated`: bfloat16 rounding without bfloat16 products. `tf32`: float32 products of a GPU in TensorFloat-32.
    """

    operand_dtype: torch.dtype = torch.float32
    sum_dtype: torch.dtype = torch.float32
    emulated: bool = False
    tf32: bool = False

    @classmethod
    def choose(cls, device: torch.device, half: bool, tf32: bool = False) -> "Precision":
        """float32, TF32, or bfloat16 in the way that the device does it best.

        Raises:
            UserError: the device does not have it.
        """
        if tf32 and (half or device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
            raise UserError("--use_tf32 is for float32 on a GPU that has TF32 (Ampere or later): leave it out here")
        if not half:
            return cls(tf32=tf32)
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError(f"{torch.cuda.get_device_name()} has no bfloat16; run without --use_half_precision")
        return cls(operand_dtype=torch.bfloat16, emulated=device.type == "cpu")

    @property
    def name(self) -> str:
        """As manifests and plans say it."""
        return "tf32" if self.tf32 else str(self.operand_dtype).removeprefix("torch.")

    @property
    def description(self) -> str:
        """As a person reads it."""
        if self.tf32:
            return "float32 with TF32 products"
        if not self.is_half:
            return self.name
        how = " (emulated: no bfloat16 units here, so it saves no time)" if self.emulated else ""
        return f"bfloat16 model and products{how}, float32 sums"

    @property
    def is_half(self) -> bool:
        return self.operand_dtype == torch.bfloat16

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype that `operand` returns."""
        return torch.float32 if self.emulated else self.operand_dtype

    @contextlib.contextmanager
    def autocast(self, device: torch.device):
        """The context for the model's forward pass; inside, `active_precision` is this one."""
        native = self.is_half and not self.emulated
        token = _ACTIVE.set(self)
        try:
            with torch.autocast(device.type, self.operand_dtype) if native else contextlib.nullcontext():
                yield
        finally:
            _ACTIVE.reset(token)

    @contextlib.contextmanager
    def rotations(self):
        """The context for products of float32 numbers whose results are rounded to operands."""
        matmul = torch.backends.cuda.matmul
        before, matmul.allow_tf32 = matmul.allow_tf32, self.tf32 or (self.is_half and not self.emulated)
        try:
            yield
        finally:
            matmul.allow_tf32 = before

    def operand(self, x: Tensor) -> Tensor:
        """x as it enters a product."""
        return x.to(self.operand_dtype).to(self.product_dtype)

    def matmul(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """a @ b for matrices (or batches of them) that `operand` made, accumulated and returned in sum_dtype.

        `out`, where given, is written to and returned.
        """
        if a.dtype == self.sum_dtype:
            return torch.matmul(a, b, out=out)
        if a.is_cuda:
            product = torch.mm if a.dim() == 2 else torch.bmm
            result = product(a, b, out_dtype=self.sum_dtype)
            return result if out is None else out.copy_(result)
        with torch.autocast(a.device.type, enabled=False):
            return torch.matmul(a.to(self.sum_dtype), b.to(self.sum_dtype), out=out)

    def add_matmul(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total += a @ b, total [rows, columns] in sum_dtype; some rows at a time where memory is short."""

        if min(total.shape) <= FEW and a.device.type == "cpu" and len(b) > SUMMED_AT_ONCE:
            # Such a product adds up in one go what larger ones add up by blocks: of 10^7 numbers 1e-3 would be lost.
            for some in slices(len(b), SUMMED_AT_ONCE):
                total += self.matmul(a[:, some], b[some])
            return

        def add(rows: slice) -> None:
            if a.dtype == total.dtype:
                total[rows].addmm_(a[rows], b)
            else:
                total[rows].add_(self.matmul(a[rows], b))

        in_halves(add, slice(0, len(total)))


_ACTIVE: ContextVar[Precision | None] = ContextVar("active_precision", default=None)


def is_in_pass() -> bool:
    """Whether a pass of the engine runs the model right now."""
    return _ACTIVE.get() is not None


def active_precision(x: Tensor) -> Precision:
    """The precision for products of x: that of the surrounding `autocast` (this module's or torch's), or x's own."""
    own = Precision(x.dtype, torch.promote_types(x.dtype, torch.float32))
    if _ACTIVE.get() is None and torch.is_autocast_enabled(x.device.type):
        return Precision(torch.get_autocast_dtype(x.device.type), own.sum_dtype)
    return _ACTIVE.get() or own
