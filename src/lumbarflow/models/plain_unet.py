"""The plain U-Net, the first net of Ahmed et al. 2024 (arXiv 2409.06018): no batch normalisation, He initialisation.

A level is convolution 3x3 + ReLU, dropout, convolution 3x3 + ReLU. With one input channel and four classes, a level
from a to b channels has 9ab + b + 9bb + b parameters, and the transposed convolution 2x2 before it 4ab + b:

| encoder | a -> b     | parameters | decoder          | up      | level   |
|---------|------------|------------|------------------|---------|---------|
| 1       | 1 -> 16    | 2,480      | 1, 256 -> 128    | 131,200 | 442,624 |
| 2       | 16 -> 32   | 13,888     | 2, 128 -> 64     | 32,832  | 110,720 |
| 3       | 32 -> 64   | 55,424     | 3, 64 -> 32      | 8,224   | 27,712  |
| 4       | 64 -> 128  | 221,440    | 4, 32 -> 16      | 2,064   | 6,944   |
| 5       | 128 -> 256 | 885,248    | classes, 16 -> 4 |         | 68      |
| sum     |            | 1,178,480  | sum              | 174,320 | 588,068 |

1,178,480 + 174,320 + 588,068 = 1,940,868. (The decoder's level reads as many channels as the transposed convolution:
half of them come from there and half from the skip connection.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lumbarflow.backend import load_keras
from lumbarflow.models import register
from lumbarflow.models.levels import check_dropouts, check_size

if TYPE_CHECKING:
    import keras


@register("plain_unet", title="U-Net")
def plain_unet(
    size: Sequence[int],
    channels: int,
    classes: int,
    *,
    precision: str = "float32",
    widths: Sequence[int] = (16, 32, 64, 128, 256),
    dropouts: Sequence[float] = (0.1, 0.1, 0.2, 0.2, 0.3),
    kernel_initializer: str = "he_normal",
) -> keras.Model:
    """The net: (n, H, W, channels) -> class probabilities float32 (n, H, W, classes).

    Args:
        size: (H, W), each divisible by the net's stride: 16 with five levels.
        channels: input channels.
        classes: output classes, softmax over them.
        precision: Keras dtype policy of all layers but the softmax, which stays in float32.
        widths, dropouts: one per level, from the finest to the coarsest; encoder and decoder mirror each other.
        kernel_initializer: of every convolution, plain or transposed.
    Raises:
        ValueError: widths and dropouts differ in number, or the size can't be halved that often.
    Source: arXiv 2409.06018, the U-Net that the authors start from.
    """
    check_dropouts("plain_unet", widths, dropouts)
    check_size("plain_unet", size, 2 ** (len(widths) - 1))
    keras = load_keras()
    layers = keras.layers
    shared = {"padding": "same", "kernel_initializer": kernel_initializer, "dtype": precision}

    def level(x, width, dropout, name):
        x = layers.Conv2D(width, 3, activation="relu", name=f"{name}_convolution_1", **shared)(x)
        x = layers.Dropout(dropout, name=f"{name}_dropout", dtype=precision)(x)
        return layers.Conv2D(width, 3, activation="relu", name=f"{name}_convolution_2", **shared)(x)

    levels = list(zip(widths, dropouts, strict=True))
    inputs = x = keras.Input((*size, channels), name="slices")
    skips = []
    for k, (width, dropout) in enumerate(levels, start=1):
        x = level(x, width, dropout, f"encoder_{k}")
        if k < len(levels):
            skips.append(x)
            x = layers.MaxPooling2D(2, name=f"encoder_{k}_pooling", dtype=precision)(x)
    for k, (width, dropout) in enumerate(reversed(levels[:-1]), start=1):
        x = layers.Conv2DTranspose(width, 2, strides=2, name=f"decoder_{k}_upsample", **shared)(x)
        x = layers.Concatenate(name=f"decoder_{k}_skip", dtype=precision)([x, skips.pop()])
        x = level(x, width, dropout, f"decoder_{k}")
    x = layers.Conv2D(classes, 1, name="classes", **shared)(x)
    # bfloat16 has 8 bits of mantissa: probabilities near 1 would be rounded to it, and the loss with them.
    outputs = layers.Softmax(name="probabilities", dtype="float32")(x)
    return keras.Model(inputs, outputs, name="plain_unet")
