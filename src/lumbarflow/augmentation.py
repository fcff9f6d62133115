"""Random changes of a training slice, the same for image and label: drawn as numbers first, then applied.

`draw_augmentation` is all the randomness, `apply_augmentation` has none: an augmentation can be logged, replayed and
tested exactly. NumPy only.

In a sagittal slice rows run from superior to inferior and columns from anterior to posterior. Left and right lie
across the slices, so the flip that anatomy allows (the body is nearly mirror-symmetric) changes no slice, only their
order. The two flips within a slice give spines that stand on their head or carry their canal in front of the vertebrae;
both exist as parameters, for experiments, and are off by default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class AugmentationSettings:
    """Widths of the distributions; 0 switches a change off.

    Attributes:
        enabled: False leaves training slices as they are.
        rotation_degrees: uniform in +- this.
        scale: enlargement, log-uniform in 1 / (1 + scale) .. 1 + scale.
        shift: uniform in +- this fraction of the slice's height and width.
        gamma: exponent, log-uniform in 1 / (1 + gamma) .. 1 + gamma.
        contrast: factor around the slice's mean, log-uniform in 1 / (1 + contrast) .. 1 + contrast.
        brightness: uniform in +- this, in units of the normalised image (standard deviations of its series).
        noise: standard deviation of Gaussian noise, uniform in 0 .. this, in the same units.
        flip_rows, flip_columns: probability of turning the slice upside down, or front to back.
    Raises:
        ValueError: a negative or infinite width, or a probability above 1.
    """

    enabled: bool = True
    rotation_degrees: float = 10.0
    scale: float = 0.15
    shift: float = 0.08
    gamma: float = 0.3
    contrast: float = 0.15
    brightness: float = 0.15
    noise: float = 0.1
    flip_rows: float = 0.0
    flip_columns: float = 0.0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"augmentation.{field.name} is {value}; expected a finite number, 0 or more.")
        for name in ("flip_rows", "flip_columns"):
            if getattr(self, name) > 1:
                raise ValueError(f"augmentation.{name} is {getattr(self, name)}; expected a probability, 0 to 1.")


@dataclass(frozen=True)
class Augmentation:
    """One drawn change; the defaults change nothing.

    Attributes:
        rotation_degrees: about the slice's centre, positive turns the picture counter-clockwise (as numpy.rot90).
            Angles are those of the pixel grid, whose pixels are square unless preprocessing stretched them.
        scale: enlargement about the centre.
        shift_rows, shift_columns: in pixels, positive moves the picture down and right.
        flip_rows, flip_columns: turn upside down, front to back; before the rotation.
        gamma: exponent on the slice's intensities, its own minimum and maximum taken as 0 and 1.
        contrast: factor on the distance from the slice's mean.
        brightness: added to every pixel.
        noise: standard deviation of added Gaussian noise.
        noise_seed: what the noise is drawn from.
    """

    rotation_degrees: float = 0.0
    scale: float = 1.0
    shift_rows: float = 0.0
    shift_columns: float = 0.0
    flip_rows: bool = False
    flip_columns: bool = False
    gamma: float = 1.0
    contrast: float = 1.0
    brightness: float = 0.0
    noise: float = 0.0
    noise_seed: int = 0

    @property
    def moves(self) -> bool:
        """Whether pixels change their place."""
        shift = (self.shift_rows, self.shift_columns)
        return self.flip_rows or self.flip_columns or (self.rotation_degrees, self.scale, *shift) != (0, 1, 0, 0)


def draw_augmentation(rng: np.random.Generator, settings: AugmentationSettings, size: Sequence[int]) -> Augmentation:
    """Draw one augmentation for a slice of `size` (H, W). Every call takes the same numbers from `rng`."""
    symmetric = rng.uniform(-1, 1, size=7)
    flips = rng.uniform(size=2)
    return Augmentation(
        rotation_degrees=float(symmetric[0] * settings.rotation_degrees),
        scale=_log_uniform(symmetric[1], settings.scale),
        shift_rows=float(symmetric[2] * settings.shift * size[0]),
        shift_columns=float(symmetric[3] * settings.shift * size[1]),
        gamma=_log_uniform(symmetric[4], settings.gamma),
        contrast=_log_uniform(symmetric[5], settings.contrast),
        brightness=float(symmetric[6] * settings.brightness),
        flip_rows=bool(flips[0] < settings.flip_rows),
        flip_columns=bool(flips[1] < settings.flip_columns),
        noise=float(rng.uniform() * settings.noise),
        noise_seed=int(rng.integers(2**32)),
    )


def apply_augmentation(
    image: np.ndarray, label: np.ndarray, augmentation: Augmentation
) -> tuple[np.ndarray, np.ndarray]:
    """The changed slice. What comes into view from outside is background, in the image the slice's minimum (air).

    Args:
        image: float (H, W), normalised intensities.
        label: integers (H, W).
    Returns:
        image: float32 (H, W), bilinear. label: (H, W) of its dtype, nearest. The inputs are not written to.
    Raises:
        ValueError: image and label differ in shape.
    """
    if image.shape != label.shape:
        raise ValueError(f"image {image.shape} and label {label.shape} differ in shape; expected one (H, W) for both.")
    image = np.array(image, dtype=np.float32)
    if augmentation.moves:
        image, label = _move(image, label, augmentation)
    else:
        label = label.copy()
    return _change_intensities(image, augmentation), label


def _log_uniform(symmetric: float, width: float) -> float:
    return float((1 + width) ** symmetric)


def _move(image: np.ndarray, label: np.ndarray, augmentation: Augmentation) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = _source_coordinates(image.shape, augmentation)
    # One pixel of outside all around, and coordinates that stop there, so that no pixel needs a test of its own.
    padded_image = np.pad(image, 1, constant_values=image.min())
    padded_label = np.pad(label, 1)
    width = padded_image.shape[1]
    rows = np.clip(rows + np.float32(1), 0, image.shape[0] + 1)
    columns = np.clip(columns + np.float32(1), 0, image.shape[1] + 1)

    # The last row and column are reached with a weight of 1 from their neighbour before, never read past.
    top = np.minimum(rows.astype(np.int32), image.shape[0])
    left = np.minimum(columns.astype(np.int32), image.shape[1])
    down, right = rows - top, columns - left
    corner = top * width + left
    flat = padded_image.ravel()
    above = _between(flat.take(corner), flat.take(corner + 1), right)
    corner += width
    below = _between(flat.take(corner), flat.take(corner + 1), right)
    moved_image = _between(above, below, down)

    # Nearest: averaging vertebra 1 and disc 3 would invent canal 2.
    nearest = (rows + np.float32(0.5)).astype(np.int32) * width + (columns + np.float32(0.5)).astype(np.int32)
    return moved_image, padded_label.ravel().take(nearest)


def _source_coordinates(size: tuple[int, int], augmentation: Augmentation) -> tuple[np.ndarray, np.ndarray]:
    """float32 (H, W) rows and columns of the input under each pixel of the output."""
    centre = (np.array(size) - 1) / 2
    angle = math.radians(augmentation.rotation_degrees)
    # Backwards from the output: undo the shift, then scale, rotation and flips, all about the centre.
    matrix = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]) / augmentation.scale
    matrix[0] *= -1 if augmentation.flip_rows else 1
    matrix[1] *= -1 if augmentation.flip_columns else 1
    rows = (np.arange(size[0]) - centre[0] - augmentation.shift_rows)[:, None]
    columns = (np.arange(size[1]) - centre[1] - augmentation.shift_columns)[None, :]
    # A sum of a column and a row vector: the grid itself is never built.
    return tuple(
        (matrix[axis, 0] * rows + centre[axis]).astype(np.float32) + (matrix[axis, 1] * columns).astype(np.float32)
        for axis in (0, 1)
    )


def _between(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    second -= first
    second *= weight
    second += first
    return second


def _change_intensities(image: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    if augmentation.gamma != 1:
        low, high = image.min(), image.max()
        # A constant slice has no range to bend.
        if high > low:
            image = ((image - low) / (high - low)) ** np.float32(augmentation.gamma) * (high - low) + low
    if augmentation.contrast != 1:
        mean = image.mean()
        image = (image - mean) * np.float32(augmentation.contrast) + mean
    if augmentation.brightness:
        image = image + np.float32(augmentation.brightness)
    if augmentation.noise:
        noise = np.random.default_rng(augmentation.noise_seed).standard_normal(image.shape, dtype=np.float32)
        image = image + noise * np.float32(augmentation.noise)
    return image
