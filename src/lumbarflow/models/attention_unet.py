"""Attention U-Net (Oktay et al. 2018, arXiv 1804.03999) in two dimensions, as wide as `plain_unet`.

A level is convolution 3x3, batch normalisation, ReLU, twice. Each skip connection but the finest passes an additive
attention gate, steered by the next coarser level g of the decoder (for the first gate, the bottom of the net). As in
the paper, the gate works on the grid of g, where its convolutions are 1x1:

    x: the skip, S channels; g: the gating signal, G channels, at half the resolution of x
    q = psi . relu(W_x . mean2x2(x) + W_g . g + b_g) + b_psi     S -> I, G -> I, I -> 1 channels, I = S / 2
    the skip goes on as x * bilinear2x(sigmoid(q))               one coefficient per pixel, for all channels

The paper leaves open how x comes to the grid of g: the mean of 2x2 pixels keeps both grids centred on each other and
adds no parameters. It gates no skip at full resolution, whose features say too little yet, and names no I: half the
skip's channels is the default of the authors' code. That code has a convolution and a normalisation behind each gate,
which the paper's equations don't have, nor has this net.

Parameters with one input channel and four classes: a level from a to b channels has 9ab + 4b + 9bb + 4b (the
convolutions have no bias, since the normalisation's follows), a transposed convolution 2x2 4ab + b, and a gate
SI + GI + I + I + 1:

| encoder | a -> b     | parameters | decoder          | up      | gate   | level   |
|---------|------------|------------|------------------|---------|--------|---------|
| 1       | 1 -> 16    | 2,576      | 1, 256 -> 128    | 131,200 | 24,705 | 443,392 |
| 2       | 16 -> 32   | 14,080     | 2, 128 -> 64     | 32,832  | 6,209  | 111,104 |
| 3       | 32 -> 64   | 55,808     | 3, 64 -> 32      | 8,224   | 1,569  | 27,904  |
| 4       | 64 -> 128  | 222,208    | 4, 32 -> 16      | 2,064   |        | 7,040   |
| 5       | 128 -> 256 | 886,784    | classes, 16 -> 4 |         |        | 68      |
| sum     |            | 1,181,456  | sum              | 174,320 | 32,483 | 589,508 |

1,181,456 + 174,320 + 32,483 + 589,508 = 1,977,767: 1.9 % more than `plain_unet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lumbarflow.backend import load_keras
from lumbarflow.models import register
from lumbarflow.models.levels import batch_normalisation, check_size

if TYPE_CHECKING:
    import keras


@register("attention_unet", title="Attention U-Net")
def attention_unet(
    size: Sequence[int],
    channels: int,
    classes: int,
    *,
    precision: str = "float32",
    widths: Sequence[int] = (16, 32, 64, 128, 256),
    batch_norm_momentum: float = 0.99,
    kernel_initializer: str = "he_normal",
) -> keras.Model:
    """The net: (n, H, W, channels) -> class probabilities float32 (n, H, W, classes).

    Args:
        size: (H, W), each divisible by the net's stride: 16 with five levels.
        channels: input channels.
        classes: output classes, softmax over them.
        precision: Keras dtype policy of all layers but the softmax, which stays in float32.
        widths: one per level, from the finest to the coarsest; encoder and decoder mirror each other.
        batch_norm_momentum: share of the moving averages kept at each step.
        kernel_initializer: of every convolution, plain or transposed.
    Raises:
        ValueError: the size can't be halved as often as there are levels.
    Source: arXiv 1804.03999, section 2; the initialisation as in the authors' code.
    """
    check_size("attention_unet", size, 2 ** (len(widths) - 1))
    keras = load_keras()
    layers = keras.layers
    shared = {"padding": "same", "kernel_initializer": kernel_initializer, "dtype": precision}

    def level(x, width, name):
        for k in (1, 2):
            x = layers.Conv2D(width, 3, use_bias=False, name=f"{name}_convolution_{k}", **shared)(x)
            x = batch_normalisation(f"{name}_norm_{k}", momentum=batch_norm_momentum, dtype=precision)(x)
            x = layers.ReLU(name=f"{name}_activation_{k}", dtype=precision)(x)
        return x

    def gate(x, signal, name):
        width = max(x.shape[-1] // 2, 1)
        skip = layers.AveragePooling2D(2, name=f"{name}_pooling", dtype=precision)(x)
        skip = layers.Conv2D(width, 1, use_bias=False, name=f"{name}_skip", **shared)(skip)
        signal = layers.Conv2D(width, 1, name=f"{name}_signal", **shared)(signal)
        both = layers.Add(name=f"{name}_sum", dtype=precision)([skip, signal])
        both = layers.ReLU(name=f"{name}_activation", dtype=precision)(both)
        attention = layers.Conv2D(1, 1, activation="sigmoid", name=f"{name}_attention", **shared)(both)
        attention = layers.UpSampling2D(2, interpolation="bilinear", name=f"{name}_upsample", dtype=precision)(
            attention
        )
        return layers.Multiply(name=f"{name}_gated", dtype=precision)([x, attention])

    inputs = x = keras.Input((*size, channels), name="slices")
    skips = []
    for k, width in enumerate(widths, start=1):
        x = level(x, width, f"encoder_{k}")
        if k < len(widths):
            skips.append(x)
            x = layers.MaxPooling2D(2, name=f"encoder_{k}_pooling", dtype=precision)(x)
    for k, width in enumerate(reversed(widths[:-1]), start=1):
        skip = skips.pop()
        if skips:
            skip = gate(skip, x, f"gate_{k}")
        x = layers.Conv2DTranspose(width, 2, strides=2, name=f"decoder_{k}_upsample", **shared)(x)
        x = layers.Concatenate(name=f"decoder_{k}_skip", dtype=precision)([x, skip])
        x = level(x, width, f"decoder_{k}")
    x = layers.Conv2D(classes, 1, name="classes", **shared)(x)
    # bfloat16 has 8 bits of mantissa: probabilities near 1 would be rounded to it, and the loss with them.
    outputs = layers.Softmax(name="probabilities", dtype="float32")(x)
    return keras.Model(inputs, outputs, name="attention_unet")
