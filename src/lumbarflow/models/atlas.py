"""The atlas that learns nothing: the most frequent class of each pixel in the training masks, once slices are aligned.

It is a Keras model with one layer, so that it is saved, served and evaluated as the nets are, and its `adapt` sets its
weights as those of Keras's preprocessing layers do. Alignment is a translation by whole pixels, found by
cross-correlation of a slice with the template; labels of the slice are not used. In order:

1. The template is the mean of the training slices, each with mean 0 and norm 1.
2. Twice: each slice is aligned with the template, and the template becomes the mean of the aligned slices.
3. Each slice is aligned with that template, its labels move with it, and the classes are counted at each pixel.
4. A new slice is aligned with the same template; the frequencies of the classes, moved onto it, are its probabilities.

Nothing wraps around: what comes from outside of a mask, or of the atlas, is background.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from lumbarflow.backend import load_keras
from lumbarflow.labels import CLASSES
from lumbarflow.models import register

if TYPE_CHECKING:
    import keras

BACKGROUND = CLASSES.index("background")
# The first template is of unaligned slices.
TEMPLATES = 3
# Images with less contrast than this share of their level are constant, all but rounding.
LEAST_CONTRAST = 1e-4
# What a pixel of shift costs in correlation. Above the rounding of float32, so that of equally good shifts the
# smallest is taken (for a constant image: none), and far below what tells one shift from another in real slices.
SHIFT_COST = 1e-5


@cache
def atlas_layer() -> type[keras.layers.Layer]:
    """The class of the atlas's layer, registered with Keras when this is first called."""
    keras = load_keras()
    ops = keras.ops

    @keras.saving.register_keras_serializable("lumbarflow")
    class Atlas(keras.layers.Layer):
        """Slices float (n, H, W, 1) -> frequencies of the classes float32 (n, H, W, classes), aligned with each slice.

        Weights, set by `adapt`: template (H, W) and frequencies (H, W, classes).

        Args:
            classes: how many.
            maximum_shift: of a slice against the template, as a share of its height and width, at least 0 and below 1.
        """

        def __init__(self, classes: int, maximum_shift: float, **kwargs):
            if not 0 <= maximum_shift < 1:
                raise ValueError(f"atlas: maximum_shift is {maximum_shift}; expected a share of the size in [0, 1).")
            super().__init__(**kwargs)
            self.classes, self.maximum_shift = int(classes), float(maximum_shift)

        def build(self, input_shape):
            *_, height, width, channels = input_shape
            if channels != 1:
                raise ValueError(f"atlas: the slices have {channels} channels; expected 1, which is aligned.")
            self.template = self.add_weight(
                shape=(height, width), initializer="zeros", trainable=False, name="template"
            )
            self.frequencies = self.add_weight(
                shape=(height, width, self.classes),
                initializer=keras.initializers.Constant(1 / self.classes),
                trainable=False,
                name="frequencies",
            )
            self.limits = int(self.maximum_shift * height), int(self.maximum_shift * width)

        def call(self, images):
            height, width = self.template.shape
            down, right = self.limits
            background = ops.full((height + 2 * down, width + 2 * right), BACKGROUND, dtype="int32")
            # JAX takes no variable here while Keras infers shapes.
            frequencies = ops.convert_to_tensor(self.frequencies)
            atlas = ops.slice_update(ops.one_hot(background, self.classes), (down, right, 0), frequencies)
            shifts = self.shifts(images)
            rows = ops.arange(height) + down - shifts[:, :1]
            columns = ops.arange(width) + right - shifts[:, 1:]
            pixels = rows[:, :, None] * (width + 2 * right) + columns[:, None, :]
            return ops.take(ops.reshape(atlas, (-1, self.classes)), pixels, axis=0)

        def shifts(self, images):
            """int32 (n, 2): how many rows down and columns right each slice lies of the template."""
            limits = self.limits
            # Zeros behind the images, so that what leaves at one side does not come back at the other.
            padding = [(0, 0), *((0, limit) for limit in limits)]
            images = ops.pad(_standardised(images[..., 0]), padding)
            template = ops.pad(_standardised(self.template[None]), padding)
            a, b = (ops.fft2((x, ops.zeros_like(x))) for x in (images, template))
            # Correlation theorem: the spectrum of the one times the conjugate of the other's.
            spectrum = a[0] * b[0] + a[1] * b[1], a[1] * b[0] - a[0] * b[1]
            scores, _ = ops.ifft2(spectrum)
            for axis, limit in enumerate(limits, start=1):
                # Negative shifts stand at the end.
                order = np.arange(-limit, limit + 1) % scores.shape[axis]
                scores = ops.take(scores, order, axis=axis)
            down, right = (np.abs(np.arange(-limit, limit + 1)) for limit in limits)
            scores = scores - SHIFT_COST * (down[:, None] + right).astype(np.float32)
            best = ops.cast(ops.argmax(ops.reshape(scores, (-1, down.size * right.size)), axis=1), "int32")
            return ops.stack([best // right.size - limits[0], best % right.size - limits[1]], axis=1)

        def adapt(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
            """Set template and frequencies.

            Args:
                batches: images float (n, H, W, 1) and labels uint8 (n, H, W); read four times.
            Raises:
                ValueError: no slices, or a label that is no class.
                FloatingPointError: an image is not finite.
            """
            self.template.assign(np.zeros(self.template.shape))
            for _ in range(TEMPLATES):
                self.template.assign(_mean(self._aligned_images(batches)))
            self.frequencies.assign(_mean(self._aligned_classes(batches)))

        def _aligned_images(self, batches):
            for k, (images, _) in enumerate(batches, start=1):
                if not np.isfinite(images).all():
                    raise FloatingPointError(
                        f"atlas: batch {k} of the training slices holds values that are not finite; expected numbers. "
                        "Look for damaged intensities in its series, or exclude it."
                    )
                standardised = ops.convert_to_numpy(_standardised(ops.convert_to_tensor(images[..., 0])))
                for image, shift in zip(standardised, self._shifts(images), strict=True):
                    yield _moved(image, -shift, 0)

        def _aligned_classes(self, batches):
            for images, labels in batches:
                if labels.max() >= self.classes:
                    raise ValueError(
                        f"atlas: a training mask holds the label {labels.max()}; expected 0 to {self.classes - 1}."
                    )
                for label, shift in zip(labels, self._shifts(images), strict=True):
                    yield np.eye(self.classes)[_moved(label, -shift, BACKGROUND)]

        def _shifts(self, images) -> np.ndarray:
            return ops.convert_to_numpy(self.shifts(ops.convert_to_tensor(images)))

        def get_config(self):
            return {**super().get_config(), "classes": self.classes, "maximum_shift": self.maximum_shift}

    def _standardised(images):
        """(n, H, W) with mean 0 and norm 1 each; constant images become 0."""
        centred = images - ops.mean(images, axis=(1, 2), keepdims=True)
        norm, level = (ops.sqrt(ops.sum(x * x, axis=(1, 2), keepdims=True)) for x in (centred, images))
        varied = norm > LEAST_CONTRAST * level
        return ops.where(varied, centred / ops.where(varied, norm, 1.0), 0.0)

    return Atlas


def adapt(model: keras.Model, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Set the weights of an atlas from training slices; arguments and errors as its layer's `adapt` has them."""
    model.get_layer("atlas").adapt(batches)


@register("atlas", title="Atlas (no learning)", adapt=adapt, register_layers=atlas_layer)
def atlas(
    size: Sequence[int], channels: int, classes: int, *, precision: str = "float32", maximum_shift: float = 0.25
) -> keras.Model:
    """The atlas: (n, H, W, 1) -> frequencies of the classes, float32 (n, H, W, classes).

    Untrained, each class is equally frequent in each pixel. The result for a slice doesn't depend on its batch.

    Args:
        size: (H, W), any.
        channels: 1.
        classes: how many.
        precision: ignored, always float32: bfloat16 resolves neither the frequencies of a few hundred slices nor the
            correlations, and there is no training to be made faster.
        maximum_shift: farthest translation of a slice, as a share of height and width, in [0, 1).
    Raises:
        ValueError: more than one channel, or a share out of range.
    """
    keras = load_keras()
    inputs = keras.Input((*size, channels), name="slices")
    outputs = atlas_layer()(classes, maximum_shift, name="atlas", dtype="float32")(inputs)
    return keras.Model(inputs, outputs, name="atlas")


def _moved(plane: np.ndarray, shift: Sequence[int], outside: float) -> np.ndarray:
    """A plane (H, W) moved down and right by `shift` pixels (up and left if negative)."""
    moved = np.full_like(plane, outside)
    to, of = (
        tuple(slice(max(s, 0), length + min(s, 0)) for s, length in zip(signed, plane.shape, strict=True))
        for signed in (shift, [-s for s in shift])
    )
    moved[to] = plane[of]
    return moved


def _mean(planes: Iterable[np.ndarray]) -> np.ndarray:
    total, count = 0.0, 0
    for plane in planes:
        total = total + plane.astype(np.float64)
        count += 1
    if not count:
        raise ValueError("atlas: there are no training slices; expected at least one. Check the split and the filters.")
    return total / count
