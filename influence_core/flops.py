"""Count the floating-point operations of products.

torch's own FlopCounterMode also says by which module, with hooks that fail where a model calls one under torch.no_grad.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopCount(TorchDispatchMode):
    """Context manager: afterwards, and meanwhile, `total` is what was done inside."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if count := flop_registry.get(func._overloadpacket):
            # A product of narrow numbers into wide ones names its output's dtype, which the counts know nothing of.
            args = [value for value in args if not isinstance(value, torch.dtype)]
            kwargs = {name: value for name, value in kwargs.items() if not isinstance(value, torch.dtype)}
            self.total += count(*args, **kwargs, out_val=out)
        return out
