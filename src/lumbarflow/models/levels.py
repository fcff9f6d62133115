"""What the U-Nets share beside Keras's layers: the checks of their levels against each other and the size."""

from __future__ import annotations

from collections.abc import Sequence


def check_size(model: str, size: Sequence[int], stride: int) -> None:
    """Raise ValueError unless (H, W) can be halved down to `stride`, that of the model's coarsest level."""
    if any(length < stride or length % stride for length in size):
        raise ValueError(
            f"{model}: size {list(size)} is not divisible by {stride}, the stride of the coarsest level. "
            f"Set preprocess.size to multiples of {stride} and preprocess again."
        )


def check_dropouts(model: str, widths: Sequence[int], dropouts: Sequence[float], prefix: str = "") -> None:
    """Raise ValueError unless every level has its dropout. `prefix` is that of both settings' names."""
    if len(widths) != len(dropouts):
        raise ValueError(
            f"{model}: {prefix}widths has {len(widths)} levels and {prefix}dropouts {len(dropouts)}; "
            "expected one dropout for each width."
        )
