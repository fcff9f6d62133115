"""Random changes of a training slice, the same for image and label: drawn as numbers first, then applied.

`draw_augmentation` is all the randomness, `apply_augmentation` has none: an augmentation can be logged, replayed and
tested exactly. NumPy only.

What the elastic change and the bias field draw are coarse grids of control points. A uniform cubic B-spline makes them
smooth: it has no creases where cells meet (a bilinear field has, and they would bend straight vertebral edges in one
point), never exceeds its control points, says in advance how far they may move before the picture folds, and costs two
small matrix products.

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

# A displacement of less than 1 / 2.0464 of the distance between control points, along rows and along columns, cannot
# fold a uniform cubic B-spline in the plane. Source: Choi and Lee, Injectivity conditions of 2D and 3D uniform cubic
# B-spline functions, Graphical Models 62 (2000). What is left of their 0.4886 keeps rounding away from a fold.
FOLD_FREE = 0.48
# A control grid has this many points more than cells along each axis; a cubic has four over every cell.
_BEYOND = 3


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
        elastic_shift: of each control point, uniform in +- this fraction of the slice's height and width, the unit of
            `shift`: it bends alike at every size. The field between them is about half as wide.
        elastic_cells: cells of the control grid along each axis; more of them bend more locally. elastic_shift *
            elastic_cells, the shift in cells, stays at or below FOLD_FREE, so that the picture never folds.
        bias_field: gain at the control points, log-uniform in 1 / (1 + bias_field) .. 1 + bias_field; so it is
            bounded everywhere, and about half as wide.
        low_resolution: probability of simulating a coarser scan.
        low_resolution_factor: of its pixels, log-uniform in 1 .. this.
    Raises:
        ValueError: a negative or infinite width, a probability above 1, no whole number of cells, a factor below 1, or
            an elastic shift that may fold.
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
    elastic_shift: float = 0.0
    elastic_cells: int = 4
    bias_field: float = 0.0
    low_resolution: float = 0.0
    low_resolution_factor: float = 2.0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"augmentation.{field.name} is {value}; expected a finite number, 0 or more.")
        for name in ("flip_rows", "flip_columns", "low_resolution"):
            if getattr(self, name) > 1:
                raise ValueError(f"augmentation.{name} is {getattr(self, name)}; expected a probability, 0 to 1.")
        if not isinstance(self.elastic_cells, int) or self.elastic_cells < 1:
            raise ValueError(f"augmentation.elastic_cells is {self.elastic_cells}; expected a whole number, 1 or more.")
        if self.low_resolution_factor < 1:
            raise ValueError(
                f"augmentation.low_resolution_factor is {self.low_resolution_factor}; expected 1 or more: "
                "how many times as large pixels become."
            )
        if self.elastic_shift * self.elastic_cells > FOLD_FREE:
            raise ValueError(
                f"augmentation.elastic_shift is {self.elastic_shift} with {self.elastic_cells} elastic_cells, which "
                f"may fold the slice over itself; expected a product of at most {FOLD_FREE}. "
                "Bend less, or in fewer cells."
            )


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
        elastic: shifts of the control points in pixels, positive down and right as above: [0] those along rows, [1]
            along columns, each (cells + 3) x (cells + 3), from one cell above and left of the slice to one beyond it.
            The bend comes after the rotation and scale, with the shift. () bends nothing.
        bias_field: logarithms of the gain at such control points. The gain multiplies the distance from the slice's
            minimum: normalised intensities have their 0 amid the tissue, and air, which gives no signal, is what a
            coil leaves as it is. () multiplies nothing.
        low_resolution: how many times as large the scan's pixels were: averaged over, then interpolated back.
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
    elastic: tuple[tuple[tuple[float, ...], ...], ...] = ()
    bias_field: tuple[tuple[float, ...], ...] = ()
    low_resolution: float = 1.0

    @property
    def moves(self) -> bool:
        """Whether pixels change their place."""
        shift = (self.shift_rows, self.shift_columns)
        affine = self.flip_rows or self.flip_columns or (self.rotation_degrees, self.scale, *shift) != (0, 1, 0, 0)
        return affine or bool(self.elastic)


def draw_augmentation(rng: np.random.Generator, settings: AugmentationSettings, size: Sequence[int]) -> Augmentation:
    """Draw one augmentation for a slice of `size` (H, W). Every call takes the same numbers from `rng`."""
    symmetric = rng.uniform(-1, 1, size=7)
    flips = rng.uniform(size=2)
    noise, noise_seed = rng.uniform(), int(rng.integers(2**32))
    # The later changes have a generator of their own: on or off, they leave the numbers of the others as they were.
    later = np.random.default_rng((noise_seed, 1))
    coarse, factor = later.uniform(size=2)
    gain = later.uniform(-1, 1, (1 + _BEYOND, 1 + _BEYOND)) * math.log1p(settings.bias_field)
    elastic = ()
    if settings.elastic_shift:
        points = settings.elastic_cells + _BEYOND
        elastic = later.uniform(-1, 1, (2, points, points)) * settings.elastic_shift
        elastic = tuple(_as_tuples(shifts * length) for shifts, length in zip(elastic, size, strict=True))
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
        noise=float(noise * settings.noise),
        noise_seed=noise_seed,
        elastic=elastic,
        bias_field=_as_tuples(gain) if settings.bias_field else (),
        low_resolution=float(settings.low_resolution_factor**factor) if coarse < settings.low_resolution else 1.0,
    )


def apply_augmentation(
    image: np.ndarray, label: np.ndarray, augmentation: Augmentation
) -> tuple[np.ndarray, np.ndarray]:
    """The changed slice. What comes into view from outside is background, in the image the slice's minimum (air).

    In order: one move of image and label (flips, rotation, scale, elastic, shift), bias field, low resolution, gamma,
    contrast, brightness, noise. Noise comes last and so is that of the net's own pixels.

    Args:
        image: float (H, W) or (H, W, channels), normalised intensities. Channels are taken as slices of one series: all
            change alike, with one minimum, maximum and mean over them all, and each has noise of its own.
        label: integers (H, W).
    Returns:
        image: float32 of its shape, bilinear. label: (H, W) of its dtype, nearest. The inputs are not written to.
    Raises:
        ValueError: image and label differ in shape.
    """
    if image.ndim not in (2, 3) or image.shape[:2] != label.shape:
        raise ValueError(
            f"image {image.shape} and label {label.shape} differ in shape; expected one (H, W) for both, "
            "of the image also (H, W, channels)."
        )
    # One plane after the other, in place: temporaries stay those of a single plane, whatever the channels.
    planes = np.array(image.transpose(2, 0, 1) if image.ndim == 3 else image[None], dtype=np.float32, order="C")
    label = _move(planes, label, augmentation) if augmentation.moves else label.copy()
    _change_intensities(planes, augmentation)
    return (planes.transpose(1, 2, 0) if image.ndim == 3 else planes[0]), label


def _log_uniform(symmetric: float, width: float) -> float:
    return float((1 + width) ** symmetric)


def _as_tuples(grid: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, grid.tolist()))


def _move(planes: np.ndarray, label: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    """The moved label; the planes (channels, H, W) are moved where they are."""
    rows, columns = _source_coordinates(label.shape, augmentation)
    height, width = label.shape[0], label.shape[1] + 2
    # One pixel of outside all around, and coordinates that stop there, so that no pixel needs a test of its own.
    padded_image = np.full((height + 2, width), planes.min(), np.float32)
    padded_label = np.pad(label, 1)
    for coordinates, length in ((rows, height), (columns, width - 2)):
        coordinates += np.float32(1)
        np.clip(coordinates, 0, length + 1, out=coordinates)

    # Nearest: averaging vertebra 1 and disc 3 would invent canal 2.
    above, pixel = np.empty_like(rows), np.empty(rows.shape, np.intp)
    pixel[:] = np.add(rows, np.float32(0.5), out=above)
    pixel *= width
    pixel += np.add(columns, np.float32(0.5), out=above).astype(np.int32)
    moved_label = padded_label.ravel().take(pixel)

    # The upper left of four. The last row and column are reached with a weight of 1 from their neighbour before, never
    # read past.
    pixel[:] = rows
    np.minimum(pixel, height, out=pixel)
    left = columns.astype(np.int32)
    np.minimum(left, width - 2, out=left)
    # Exact in float32: they are the fractions of such numbers. NumPy by itself would subtract integers in float64.
    down = np.subtract(rows, pixel, out=rows, dtype=np.float32, casting="unsafe")
    right = np.subtract(columns, left, out=columns, dtype=np.float32, casting="unsafe")
    pixel *= width
    pixel += left

    # Into arrays that exist: the system takes longer to hand out a new one than NumPy to fill it. Clipping clips
    # nothing here, but `take` would otherwise fill a new array first.
    flat, beside = padded_image.ravel(), np.empty_like(rows)
    for plane in planes:
        padded_image[1:-1, 1:-1] = plane
        flat.take(pixel, out=beside, mode="clip")
        pixel += 1
        _between(beside, flat.take(pixel, out=above, mode="clip"), right)
        pixel += width
        flat.take(pixel, out=plane, mode="clip")
        pixel -= 1
        below = _between(flat.take(pixel, out=beside, mode="clip"), plane, right)
        pixel -= width
        _between(above, below, down)
    return moved_label


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
    source = tuple(
        (matrix[axis, 0] * rows + centre[axis]).astype(np.float32) + (matrix[axis, 1] * columns).astype(np.float32)
        for axis in (0, 1)
    )
    if augmentation.elastic:
        # Undone with the shift, before the matrix: a bend that does not fold cannot fold by a rotation after it. The
        # spline is linear in its control points, so the matrix turns those few instead of every pixel.
        for coordinates, shifts in zip(source, np.tensordot(matrix, np.array(augmentation.elastic), 1), strict=True):
            coordinates -= _spline(shifts, size)
    return source


def _spline(control: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float32 (H, W): the uniform cubic B-spline of a grid of control points, its cells laid over the slice."""
    down, across = (_spline_weights(*one) for one in zip(size, control.shape, strict=True))
    return down @ control.astype(np.float32) @ across.T


def _spline_weights(length: int, points: int) -> np.ndarray:
    """float32 (length, points): what each control point counts at each pixel's centre."""
    place = (np.arange(length) + 0.5) / length * (points - _BEYOND)
    cell = np.minimum(place.astype(int), points - _BEYOND - 1)
    t = place - cell
    weights = np.zeros((length, points), np.float32)
    pieces = ((1 - t) ** 3, 4 + t**2 * (3 * t - 6), 1 + 3 * t * (1 + t - t**2), t**3)
    for beyond, piece in enumerate(pieces):
        weights[np.arange(length), cell + beyond] = piece / 6
    return weights


def _between(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    second -= first
    second *= weight
    second += first
    return second


def _change_intensities(planes: np.ndarray, augmentation: Augmentation) -> None:
    if augmentation.bias_field:
        gain = _spline(np.array(augmentation.bias_field), planes.shape[1:])
        np.exp(gain, out=gain)
        low = planes.min()
        planes -= low
        planes *= gain
        planes += low
    if augmentation.low_resolution != 1:
        _coarsen(planes, augmentation.low_resolution)
    if augmentation.gamma != 1:
        low, high = planes.min(), planes.max()
        # A constant slice has no range to bend.
        if high > low:
            planes -= low
            planes /= high - low
            planes **= np.float32(augmentation.gamma)
            planes *= high - low
            planes += low
    if augmentation.contrast != 1:
        mean = planes.mean()
        planes -= mean
        planes *= np.float32(augmentation.contrast)
        planes += mean
    if augmentation.brightness:
        planes += np.float32(augmentation.brightness)
    if augmentation.noise:
        rng = np.random.default_rng(augmentation.noise_seed)
        for plane in planes:
            noise = rng.standard_normal(plane.shape, dtype=np.float32)
            noise *= np.float32(augmentation.noise)
            plane += noise


def _coarsen(planes: np.ndarray, factor: float) -> None:
    """Average over pixels `factor` times as large, as a scanner does (skipping would alias), and interpolate back."""
    lengths = planes.shape[1:]
    coarse = [max(1, round(length / factor)) for length in lengths]
    rows_down, columns_down = (_averaging(*both) for both in zip(lengths, coarse, strict=True))
    rows_up, columns_up = (_interpolation(*both) for both in zip(coarse, lengths, strict=True))
    for plane in planes:
        # Rows first and last: the costlier gathering along columns meets the fewest pixels.
        small = _gather(_gather(plane, rows_down, 0), columns_down, 1)
        plane[:] = _gather(_gather(small, columns_up, 1), rows_up, 0)


def _averaging(fine: int, coarse: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For `_gather`: the mean of the fine pixels in each coarse one, those on its edge by the part that lies within."""
    width = fine / coarse
    start = np.arange(coarse) * width
    first = start.astype(int)
    taps = []
    for offset in range(math.ceil(width) + 1):
        pixel = first + offset
        within = np.minimum(pixel + 1, start + width) - np.maximum(pixel, start)
        taps.append((np.minimum(pixel, fine - 1), (np.maximum(within, 0) / width).astype(np.float32)))
    return taps


def _interpolation(coarse: int, fine: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For `_gather`: linear between the centres of coarse pixels, beyond the outermost as there."""
    place = np.clip((np.arange(fine) + 0.5) * (coarse / fine) - 0.5, 0, coarse - 1)
    first = place.astype(int)
    weight = (place - first).astype(np.float32)
    return [(first, 1 - weight), (np.minimum(first + 1, coarse - 1), weight)]


def _gather(plane: np.ndarray, taps: list[tuple[np.ndarray, np.ndarray]], axis: int) -> np.ndarray:
    """A weighted sum of pixels for each new one along `axis`: each tap has their indices and weights."""
    total = np.float32(0)
    for index, weight in taps:
        part = plane.take(index, axis)
        part *= weight if axis else weight[:, None]
        part += total
        total = part
    return total
