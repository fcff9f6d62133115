"""The modified U-Net of Ahmed et al. 2024 (arXiv 2409.06018), from plain Keras layers.

Dictionary between the paper's names and ours:

| paper                             | here                                                              |
|-----------------------------------|-------------------------------------------------------------------|
| contracting path, c1 ... c5       | `encoder_1` ... `encoder_5`, at stride 1, 2, 4, 8 and 16          |
| extra level, c6                   | `encoder_6`, at stride 16 too: no pooling stands before it        |
| expansive path, c7 ... c10        | `decoder_1` ... `decoder_4`, at stride 8, 4, 2 and 1              |
| up-sample block                   | transposed convolution 3x3, batch normalisation, LeakyReLU        |
| u7 (as coded, the only such block)| `decoder_1_upsample`; the other levels: transposed convolution 2x2|
| skip connection                   | `decoder_k_skip`: concatenation with the encoder of equal stride  |
| "level"                           | convolution 3x3 + ReLU, batch normalisation, dropout, convolution 3x3 + ReLU |

Parameters as coded, with one input channel and four classes. A level from a to b channels has
9ab + b (first convolution) + 4b (batch normalisation, two of them moving averages) + 9bb + b:

| encoder | a -> b     | parameters | decoder                     | parameters |
|---------|------------|------------|-----------------------------|------------|
| 1       | 1 -> 16    | 2,544      | up 512 -> 256 (3x3, and BN) | 1,180,928  |
| 2       | 16 -> 32   | 14,016     | 256 + 128 -> 256            | 1,476,096  |
| 3       | 32 -> 64   | 55,680     | up 256 -> 128 (2x2)         | 131,200    |
| 4       | 64 -> 128  | 221,952    | 128 + 64 -> 128             | 369,408    |
| 5       | 128 -> 256 | 886,272    | up 128 -> 64                | 32,832     |
| 6       | 256 -> 512 | 3,542,016  | 64 + 32 -> 64               | 92,544     |
|         |            |            | up 64 -> 32                 | 8,224      |
|         |            |            | 32 + 16 -> 32               | 23,232     |
|         |            |            | classes, 32 -> 4 (1x1)      | 132        |
| sum     |            | 4,722,480  | sum                         | 3,314,596  |

4,722,480 + 3,314,596 = 8,037,076.

Beyond the paper: group or instance normalisation in place of the batch's, both without the moving averages (2b of a
level's 4b), and deep supervision, whose heads end the coarser decoder levels during training:

| head of stride | reads       | layers                           | parameters |
|----------------|-------------|----------------------------------|------------|
| 2              | `decoder_3` | `classes_2`, `probabilities_2`   | 260        |
| 4              | `decoder_2` | `classes_4`, `probabilities_4`   | 516        |
| 8              | `decoder_1` | `classes_8`, `probabilities_8`   | 1,028      |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lumbarflow.backend import load_keras
from lumbarflow.models import register
from lumbarflow.models.levels import batch_normalisation, check_dropouts, check_groups, check_size

if TYPE_CHECKING:
    import keras

NORMALISATIONS = ("batch", "group", "instance")


@register("modified_unet", title="Modified U-Net")
def modified_unet(
    size: Sequence[int],
    channels: int,
    classes: int,
    *,
    precision: str = "float32",
    encoder_widths: Sequence[int] = (16, 32, 64, 128, 256, 512),
    encoder_dropouts: Sequence[float] = (0.1, 0.1, 0.2, 0.2, 0.3, 0.3),
    decoder_widths: Sequence[int] = (256, 128, 64, 32),
    decoder_dropouts: Sequence[float] = (0.2, 0.2, 0.1, 0.1),
    leaky_relu_slope: float = 0.1,
    upsample_block: Literal["first", "all"] = "first",
    normalisation: Literal["batch", "group", "instance"] = "batch",
    groups: int = 8,
    batch_norm_momentum: float = 0.99,
    kernel_initializer: str = "glorot_uniform",
    deep_supervision: int = 0,
) -> keras.Model:
    """The net: (n, H, W, channels) -> class probabilities float32 (n, H, W, classes).

    With deep supervision it returns a list: these, then the same at half the resolution, (n, H / 2, W / 2, classes),
    at a quarter, and so on. `models.serving_model` takes the first alone.

    Args:
        size: (H, W), each divisible by the net's stride: 16 with the paper's six encoder levels.
        channels: input channels.
        classes: output classes, softmax over them.
        precision: Keras dtype policy of all layers but the softmax, which stays in float32.
        encoder_widths, encoder_dropouts: one per encoder level, the last being the level without pooling.
        decoder_widths, decoder_dropouts: one per decoder level, two fewer than the encoder has.
        leaky_relu_slope: slope of the up-sample block's LeakyReLU for negative values.
        upsample_block: "first", at the first decoder level only (the authors' code), or "all" (their text).
        normalisation: of each level and up-sample block: "batch" (the paper's), synchronised between devices; "group",
            of each slice's channels in groups (Wu & He 2018, arXiv 1803.08494), or "instance", of each channel of
            each slice (Ulyanov et al. 2016, arXiv 1607.08022). The latter two don't depend on the batch.
        groups: how many groups "group" makes of the channels; divides every width. The others don't heed it.
        batch_norm_momentum: share of the moving averages kept at each step; for "batch" only.
        kernel_initializer: of every convolution, plain or transposed.
        deep_supervision: so many of the decoder's coarser levels, from the finest of them on, have a head of their own
            (convolution 1x1, softmax) for the loss to reach them directly (Lee et al. 2015, arXiv 1409.5185).
    Raises:
        ValueError: the widths, dropouts, groups or size don't fit together, upsample_block or normalisation is unknown,
            or there are fewer coarser decoder levels than deep_supervision.
    Source: arXiv 2409.06018, section on the modified U-Net, and the authors' code.
    """
    _check(size, encoder_widths, encoder_dropouts, decoder_widths, decoder_dropouts, upsample_block)
    _check_normalisation(normalisation, groups, encoder_widths, decoder_widths)
    _check_deep_supervision(deep_supervision, decoder_widths)
    keras = load_keras()
    layers = keras.layers
    shared = {"padding": "same", "kernel_initializer": kernel_initializer, "dtype": precision}

    def normalise(x, name):
        if normalisation == "batch":
            return batch_normalisation(name, momentum=batch_norm_momentum, dtype=precision)(x)
        # Keras takes -1 for as many groups as channels.
        return layers.GroupNormalization(groups if normalisation == "group" else -1, name=name, dtype=precision)(x)

    def level(x, width, dropout, name):
        x = layers.Conv2D(width, 3, activation="relu", name=f"{name}_convolution_1", **shared)(x)
        x = normalise(x, f"{name}_norm")
        x = layers.Dropout(dropout, name=f"{name}_dropout", dtype=precision)(x)
        return layers.Conv2D(width, 3, activation="relu", name=f"{name}_convolution_2", **shared)(x)

    def upsample(x, width, name, block):
        x = layers.Conv2DTranspose(width, 3 if block else 2, strides=2, name=f"{name}_upsample", **shared)(x)
        if block:
            x = normalise(x, f"{name}_upsample_norm")
            x = layers.LeakyReLU(leaky_relu_slope, name=f"{name}_upsample_activation", dtype=precision)(x)
        return x

    def head(x, suffix=""):
        x = layers.Conv2D(classes, 1, name=f"classes{suffix}", **shared)(x)
        # bfloat16 has 8 bits of mantissa: probabilities near 1 would be rounded to it, and the loss with them.
        return layers.Softmax(name=f"probabilities{suffix}", dtype="float32")(x)

    inputs = x = keras.Input((*size, channels), name="slices")
    skips, decoded = [], []
    for k, (width, dropout) in enumerate(zip(encoder_widths, encoder_dropouts, strict=True), start=1):
        x = level(x, width, dropout, f"encoder_{k}")
        if k <= len(decoder_widths):
            skips.append(x)
            x = layers.MaxPooling2D(2, name=f"encoder_{k}_pooling", dtype=precision)(x)
    for k, (width, dropout) in enumerate(zip(decoder_widths, decoder_dropouts, strict=True), start=1):
        x = upsample(x, width, f"decoder_{k}", block=upsample_block == "all" or k == 1)
        x = layers.Concatenate(name=f"decoder_{k}_skip", dtype=precision)([x, skips.pop()])
        x = level(x, width, dropout, f"decoder_{k}")
        decoded.append(x)
    outputs = head(decoded.pop())
    if deep_supervision:
        # After the net's own layers, so that these draw the same initial weights with and without.
        coarser = zip(range(1, deep_supervision + 1), reversed(decoded), strict=False)
        outputs = [outputs, *(head(x, f"_{2**k}") for k, x in coarser)]
    return keras.Model(inputs, outputs, name="modified_unet")


def _check(size, encoder_widths, encoder_dropouts, decoder_widths, decoder_dropouts, upsample_block) -> None:
    check_dropouts("modified_unet", encoder_widths, encoder_dropouts, "encoder_")
    check_dropouts("modified_unet", decoder_widths, decoder_dropouts, "decoder_")
    if len(encoder_widths) != len(decoder_widths) + 2:
        raise ValueError(
            f"modified_unet: {len(encoder_widths)} encoder levels and {len(decoder_widths)} decoder levels; "
            "expected two fewer decoder levels, since the last two encoder levels share the coarsest resolution."
        )
    check_size("modified_unet", size, 2 ** len(decoder_widths))
    if upsample_block not in ("first", "all"):
        raise ValueError(f'modified_unet: upsample_block is {upsample_block!r}; expected "first" or "all".')


def _check_normalisation(normalisation, groups, encoder_widths, decoder_widths) -> None:
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"modified_unet: normalisation is {normalisation!r}; expected one of {list(NORMALISATIONS)}.")
    if normalisation == "group":
        check_groups("modified_unet", groups, encoder_widths, "encoder_")
        check_groups("modified_unet", groups, decoder_widths, "decoder_")


def _check_deep_supervision(deep_supervision, decoder_widths) -> None:
    coarser = len(decoder_widths) - 1
    if deep_supervision not in range(coarser + 1):
        raise ValueError(
            f"modified_unet: deep_supervision is {deep_supervision}; expected 0 to {coarser}, since of the "
            f"{len(decoder_widths)} decoder levels the last has the net's own output."
        )
