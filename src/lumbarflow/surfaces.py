"""Distances between the surfaces of two masks, in mm, as DeepMind's `surface-distance` defines them.

The surface of a mask lies between its voxels and the others: every corner of the grid whose neighbouring voxels (8 in a
volume, 4 in a slice) are not all alike is a surface element, with the area (in a slice: the length) that marching cubes
give to those neighbours. Beyond the array's border there is background: a mask that reaches it is closed there.

Only the areas come from that package. Its distances are the same (`benchmarks/metrics.py` compares both), but it
computes them in the whole box of both masks, which takes longer, and with NumPy 2 it stops at an empty mask (`np.Inf`).
Here a k-d tree finds the nearest element of the other surface, so that the cost goes with the surfaces.

Source: Nikolov et al., Deep learning to achieve clinically applicable segmentation of head and neck anatomy,
arXiv:1809.04430, and https://github.com/google-deepmind/surface-distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree
from surface_distance import lookup_tables

# Share of the grid's corners that lie on a surface from which on a distance transform is the faster way.
DENSE = 1 / 12


@dataclass(frozen=True)
class SurfaceDistances:
    """Every element of both surfaces: how far the other surface is, and how much surface the element stands for.

    Attributes:
        reference_to_prediction_mm, prediction_to_reference_mm: float64 (elements,), inf where the other mask is empty.
        reference_areas, prediction_areas: float64 (elements,), mm2 of volumes and mm of slices.
    """

    reference_to_prediction_mm: np.ndarray
    prediction_to_reference_mm: np.ndarray
    reference_areas: np.ndarray
    prediction_areas: np.ndarray

    @property
    def asd_mm(self) -> float:
        """Symmetric average surface distance: the mean over both areas. inf if one mask is empty, NaN if both are."""
        if not self._area:
            return float("nan")
        distances = self.reference_to_prediction_mm @ self.reference_areas
        distances += self.prediction_to_reference_mm @ self.prediction_areas
        return float(distances / self._area)

    def hausdorff_mm(self, percent: float = 95) -> float:
        """The greater of the distances that `percent` of either surface's area keep.

        inf if one mask is empty, NaN if both are.
        """
        sides = (
            (self.reference_to_prediction_mm, self.reference_areas),
            (self.prediction_to_reference_mm, self.prediction_areas),
        )
        return max((weighted_percentile(*side, percent) for side in sides if len(side[0])), default=float("nan"))

    def nsd(self, tolerance_mm: float) -> float:
        """Normalised surface distance (surface Dice): share of both areas within `tolerance_mm` of the other surface.

        0 if one mask is empty, NaN if both are.
        """
        if not self._area:
            return float("nan")
        near = self.reference_areas[self.reference_to_prediction_mm <= tolerance_mm].sum()
        near += self.prediction_areas[self.prediction_to_reference_mm <= tolerance_mm].sum()
        return float(near / self._area)

    @property
    def _area(self) -> float:
        return self.reference_areas.sum() + self.prediction_areas.sum()


def surface_distances(reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float]) -> SurfaceDistances:
    """Distance from every element of each surface to the other surface.

    Args:
        reference, prediction: bool (slice, row, column) or (row, column), on the same grid.
        spacing_mm: voxel size along the same axes.
    Raises:
        ValueError: shapes differ, an array of other dimensions, a spacing that does not fit them or is not positive.
    """
    if reference.shape != prediction.shape:
        raise ValueError(
            f"prediction of shape {prediction.shape}; expected the reference's {reference.shape}. "
            "Bring both onto one grid first"
        )
    if (
        reference.ndim not in (2, 3)
        or len(spacing_mm) != reference.ndim
        or not all(0 < mm < np.inf for mm in spacing_mm)
    ):
        raise ValueError(
            f"masks of shape {reference.shape} with the spacing {tuple(spacing_mm)} mm; expected two or three "
            "dimensions and one positive spacing for each. Give spacing_mm in the order of the array's axes"
        )
    spacing = tuple(float(mm) for mm in spacing_mm)
    box = bounding_box(reference | prediction)
    areas = _areas(spacing)
    reference_codes, prediction_codes = _neighbour_codes(reference[box]), _neighbour_codes(prediction[box])
    # Neighbours that are all background (0) or all mask (the last code) meet no surface.
    on_reference = (reference_codes != 0) & (reference_codes != len(areas) - 1)
    on_prediction = (prediction_codes != 0) & (prediction_codes != len(areas) - 1)
    return SurfaceDistances(
        _nearest_mm(on_reference, on_prediction, spacing),
        _nearest_mm(on_prediction, on_reference, spacing),
        areas[reference_codes[on_reference]],
        areas[prediction_codes[on_prediction]],
    )


def weighted_percentile(values: np.ndarray, weights: np.ndarray, percent: float) -> float:
    """Smallest of `values` up to which `percent` of the weights lie; no interpolation. Both float (n,), n > 0."""
    order = np.argsort(values)
    shares = np.cumsum(weights[order])
    place = np.searchsorted(shares / shares[-1], percent / 100)
    return float(values[order[min(place, len(order) - 1)]])


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box around the mask; empty if the mask is."""
    box = []
    for axis in range(mask.ndim):
        filled = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(filled[0], filled[-1] + 1) if len(filled) else slice(0, 0))
    return tuple(box)


def _neighbour_codes(mask: np.ndarray) -> np.ndarray:
    """uint8, one longer along each axis: which neighbours of a corner of the grid are in the mask, one bit each."""
    codes = np.pad(mask, 1).view(np.uint8)
    # The order of the bits is that of the package's tables: along the last axis the earlier neighbour counts 2 and the
    # later one 1, along the axis before it 4 and 1, and along the first of three 16 and 1.
    for axis, weight in zip(reversed(range(mask.ndim)), (2, 4, 16), strict=False):
        steps = np.moveaxis(codes, axis, 0)
        codes = np.moveaxis(weight * steps[:-1] + steps[1:], 0, axis)
    return codes


@lru_cache(maxsize=64)
def _areas(spacing: tuple[float, ...]) -> np.ndarray:
    """Area of the surface element of every neighbour code, float64 (16,) or (256,)."""
    if len(spacing) == 2:
        return lookup_tables.create_table_neighbour_code_to_contour_length(spacing)
    return lookup_tables.create_table_neighbour_code_to_surface_area(spacing)


def _nearest_mm(on_surface: np.ndarray, on_other: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Distance from each element of one surface to the nearest one of the other, float64 (elements,).

    Args:
        on_surface, on_other: bool, the corners of the same grid that the surfaces pass.
    """
    if not on_other.any():
        return np.full(np.count_nonzero(on_surface), np.inf)
    apart = on_surface & ~on_other
    if np.count_nonzero(apart) + np.count_nonzero(on_other) > DENSE * on_other.size:
        return ndimage.distance_transform_edt(~on_other, sampling=spacing)[on_surface]
    elements, others = np.argwhere(apart), np.argwhere(on_other)
    # Balancing the tree takes longer than it saves on a grid, where many coordinates are equal.
    tree = cKDTree(others * spacing, balanced_tree=False, compact_nodes=False)
    _, nearest = tree.query(elements * spacing)
    distances = np.zeros(apart.shape)
    # Of whole steps, not of the coordinates: rounding must not push 2 steps of 0.5 mm over a tolerance of 1 mm.
    distances[apart] = np.linalg.norm((elements - others[nearest]) * spacing, axis=1)
    return distances[on_surface]
