"""Which attention kernel torch takes on a GPU: flash in 16 bits, the memory-efficient one otherwise."""

import torch

aten = torch.ops.aten


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """As torch.nn.functional's, on the modelled device; kernels are named, as torch has nothing to choose by."""
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    with torch.autocast("cuda", enabled=False):
        if query.dtype.itemsize == 2 and attn_mask is None:
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )[0]
