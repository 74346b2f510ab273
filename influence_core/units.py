"""Numbers as a person reads them."""


def gigabytes(num_bytes: float) -> str:
    """Bytes as a person reads them (1 GB = 10^9 bytes)."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
