"""Measurements per level, in mm, of a label map with SPIDER's instances: heights, depths, canal, lordosis.

They are those of `phantom.anatomy`, taken from voxels: chords on the mid-sagittal surface, which is the canal's plane
of symmetry at each level. Definitions with their sources, accuracy and limits: docs/reference/measurements.md.

A wall is not where a voxel happens to end. A smooth curve is fitted to all the places where neighbouring voxels differ,
over a stretch of wall and the slices around the middle, so that the steps of the grid average out: a chord is then
wrong by a tenth of a pixel on average, and by almost a whole one only where two walls run exactly along the grid.

Coordinates below are those of the sagittal grid in mm: x along the slices, y posterior along the columns, z superior
against the rows. The slices, not the scanner's LPS axes, tell the sagittal plane: they are laid along the spine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from lumbarflow.imaging import LabelMap, sagittal_orientation
from lumbarflow.labels import CANAL_ID, DISC_OFFSET, PARTIAL_OFFSET

if TYPE_CHECKING:
    import pandas as pd

# Heights are taken at these shares of the depth; there the rounding of the corners has not begun.
HEIGHTS = {"anterior": -0.35, "middle": 0.0, "posterior": 0.35}
LUMBAR = 5  # vertebrae, from the lowest up: L5 to L1, if the lowest is L5

_STRETCH = 0.38  # of the height, to either side: where a wall is fitted
_PLATE_STRETCH = 0.42  # of the depth, to either side: where an endplate is fitted
_BAND_MM = 6.0  # of slices to either side of the middle that take part in a fit
_CORNER_MM = 2.0  # before each wall, at least, where an endplate is not fitted
_CANAL_STRETCH_MM = 6.0  # of canal wall, up and down, that takes part in a fit
_MIDLINE_STRETCH_MM = 8.0  # of canal, up and down, whose symmetry gives the middle
_FACING = 0.3  # of a pixel: how far a step may lead back inside, as those along a level wall do
_FEWEST = 3  # steps that tell where a wall is
_POWERS_FROM = (2.5, 12.0)  # pixels of stretch that tell how a wall bends, and how it bends back towards its ends
_OFF_PIXELS = 2.0  # from the nearest step: farther off, a wall is not what its curve says
_ROUNDS = 6  # until a frame has settled; it does after three

_IN_PLANE = ndimage.generate_binary_structure(3, 1) & np.array([False, True, False])[:, None, None]

_CUT = "cut by the image's edge"
_OUTSIDE = "the middle of the canal lies outside the slices"
_TOO_FEW = "too few voxels in the middle slices"
_NO_OUTLINE = "no two endplates and two walls in the middle slices"
_OFF = "doubtful: an end lies off the outline"
_NO_CANAL = "no canal at this level"
_OWN_MIDDLE = "no canal at this level: taken in the structure's own middle"


@dataclass(frozen=True)
class Measurement:
    """One length or angle.

    Attributes:
        structure: "vertebra", "disc" or "spine".
        number: n for vertebra n, or the disc below vertebra n, from the lowest up; None for the spine.
        quantity: body_height_anterior, _middle, _posterior, body_depth and canal_ap of a vertebra; height_anterior,
            _middle, _posterior, depth and canal_ap of a disc; lordosis of the spine.
        value: nan where it cannot be measured.
        unit: "mm" or "degrees".
        ends_mm: LPS end points of the chord, two triples; of the angle its two endplates, each as its anterior and
            posterior end. Empty where value is nan.
        note: why value is nan or doubtful, or which endplates make the angle; else "".
    """

    structure: str
    number: int | None
    quantity: str
    value: float
    unit: str
    ends_mm: tuple
    note: str


def measure(instances: LabelMap) -> list[Measurement]:
    """All measurements of a scan: its vertebrae and discs from the lowest up, then the lordosis.

    Args:
        instances: sagittal (`imaging.to_sagittal`), with vertebrae 1.. from the lowest up, 100 + n for a vertebra n
            that the image's edge cuts, canal 100, and discs 201.., disc 200 + n below vertebra n.
    Raises:
        ValueError: the label map is not sagittal.
    """
    orientation = sagittal_orientation(instances.direction)
    if orientation.axes != (0, 1, 2) or any(orientation.flips):
        raise ValueError(
            f"a label map with array axes {orientation.axes}, flipped {orientation.flips}; expected a sagittal one. "
            "Pass what imaging.to_sagittal returns."
        )
    scan = _Scan(instances)
    parts = scan.parts()
    outlines = [_outline(scan, part, *_neighbours(parts, place)) for place, part in enumerate(parts)]
    found = []
    for part, outline in zip(parts, outlines, strict=True):
        found += _chords(scan, part, outline)
    return [*found, _lordosis(scan, parts, outlines)]


def measurement_table(measurements: list[Measurement]) -> pd.DataFrame:
    """One row per measurement: structure, number, quantity, value, unit, note."""
    import pandas as pd

    columns = ("structure", "number", "quantity", "value", "unit", "note")
    rows = [[getattr(measurement, column) for column in columns] for measurement in measurements]
    return pd.DataFrame(rows, columns=columns).astype({"number": "Int64", "value": "float64"})


def class_name(label: int) -> str:
    """The class, one of `labels.CLASSES`, of an instance id above 0."""
    return "IVD" if label > DISC_OFFSET else "canal" if label == CANAL_ID else "vertebrae"


# --- Frames and surfaces --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """Axes of a body or disc in the sagittal plane: origin (y, z), u posterior, w superior; tilt lifts u."""

    y: float
    z: float
    tilt: float

    @property
    def axes(self) -> np.ndarray:
        """(2, 2): the unit vectors u and w as rows, each (y, z)."""
        cosine, sine = math.cos(self.tilt), math.sin(self.tilt)
        return np.array([[cosine, sine], [-sine, cosine]])

    def to_local(self, points: np.ndarray) -> np.ndarray:
        """(y, z) in the last axis -> (u, w)."""
        return (points - (self.y, self.z)) @ self.axes.T

    def to_plane(self, u: float, w: float) -> np.ndarray:
        """(u, w) -> (y, z)."""
        return (self.y, self.z) + np.array([u, w]) @ self.axes


@dataclass(frozen=True)
class _Steps:
    """Where neighbouring voxels differ: the wall passes between their centres.

    Attributes:
        points: (n, 3) halfway between both centres.
        outward: (n, 2), (y, z): from the inner centre to the outer one.
        pixel_mm: the larger spacing in the plane.
    """

    points: np.ndarray
    outward: np.ndarray
    pixel_mm: float

    def wall(
        self,
        frame: _Frame,
        middle_mm: float,
        axis: int,
        side: int,
        stretch_mm: float,
        from_mm: float = 0.0,
        across: int = 1,
    ) -> np.ndarray | None:
        """The curve of the wall that faces `side` (-1, 1) of a frame's axis (0: u, 1: w); None with too few steps.

        `across` is its degree over the slices: 1 for bodies and discs, which are wide, 2 for the canal. Only steps
        within `stretch_mm` along the other axis take part, and beyond `from_mm` along this one.

        Returns:
            (1 + degree,): coefficients of the place on the axis over the other axis, in the plane x = middle_mm. The
            degree is 4, but 2 or 0 where the stretch has few pixels.
        """
        local = frame.to_local(self.points[:, 1:])
        over, place, x = local[:, 1 - axis], local[:, axis], self.points[:, 0] - middle_mm
        outwards = side * (self.outward @ frame.axes[axis])
        powers = sum(stretch_mm >= pixels * self.pixel_mm for pixels in _POWERS_FROM)
        # A constant has no slope for the steps that lead along a wall.
        least = (-_FACING if powers else _FACING) * self.pixel_mm
        taken = (outwards > least) & (np.abs(over) <= stretch_mm) & (side * place >= from_mm)
        # A step from one column to the next tells the height of a level wall far better than one from row to row.
        weight = 1 / np.maximum(np.abs(outwards), 0.2 * self.pixel_mm)
        if taken.sum() < _FEWEST:
            return None
        return _fitted(over[taken], x[taken], place[taken], weight[taken], self.pixel_mm, 2 * powers, across)

    def distance(self, place: np.ndarray) -> float:
        """From a place (y, z) to the nearest step in the plane, in mm."""
        return float(np.sqrt(np.square(self.points[:, 1:] - place).sum(axis=1).min()))


def _fitted(over, x, place, weight, pixel_mm: float, degree: int, across: int) -> np.ndarray:
    """Weighted least squares of the powers of t up to `degree` and of x up to `across`, if there are slices enough.

    What lies far off the rest (an osteophyte, a hole) does not count.
    """
    scale = float(np.abs(over).max()) or 1.0
    terms = [(over / scale) ** power for power in range(degree + 1)]
    terms += [x / _BAND_MM, np.square(x / _BAND_MM)][: min(len(np.unique(np.round(x, 6))) - 1, across)]
    design = np.stack(terms, axis=1)
    taken = np.ones(len(over), bool)
    for _ in range(3):
        each = weight[taken]
        solution = np.linalg.lstsq(design[taken] * each[:, None], place[taken] * each)[0]
        residual = np.abs(design @ solution - place)
        before, taken = taken, residual <= max(1.25 * pixel_mm, 4 * float(np.median(residual)))
        if np.array_equal(before, taken):
            break
    return solution[: degree + 1] / scale ** np.arange(degree + 1)


def _at(curve: np.ndarray, position: float) -> float:
    return float(np.polynomial.polynomial.polyval(position, curve))


def _slope(curve: np.ndarray, reach: float) -> float:
    """Of the straight line through a curve's points at -reach and reach."""
    return (_at(curve, reach) - _at(curve, -reach)) / (2 * reach)


# --- The scan and its parts -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A body or disc in the slices around the middle; `steps` is None where `note` says why there is nothing to fit."""

    structure: str
    number: int
    centroid: tuple[float, float] | None  # (y, z)
    middle_mm: float
    steps: _Steps | None
    note: str


class _Scan:
    """A label map's voxels by structure, and its canal."""

    def __init__(self, instances: LabelMap):
        self.grid, self.array = instances, instances.array
        self.spacing = np.array(instances.spacing_mm[::-1])  # slice, row, column
        self.pixel_mm = float(self.spacing[1:].max())
        self.boxes = {label: box for label, box in enumerate(ndimage.find_objects(self.array), start=1) if box}
        self.canal_steps = self.canal_mask = None
        if box := self.boxes.get(CANAL_ID):
            self.canal_box = box
            self.canal_mask = _largest(self.array[box] == CANAL_ID)  # without the specks of a drawn or predicted one
            self.canal_steps = self.steps(self.canal_mask, box)

    def lps(self, point) -> tuple[float, float, float]:
        """LPS position of a point (x, y, z) of the grid in mm."""
        x, y, z = point
        index = (y / self.spacing[2], -z / self.spacing[1], x / self.spacing[0])
        return tuple(float(value) for value in self.grid.physical_point(index))

    def steps(self, mask: np.ndarray, box: tuple[slice, ...]) -> _Steps:
        """Of a bool mask of a box. The image's edge is no wall: nobody knows what lies behind it."""
        pads = [(int(part.start > 0), int(part.stop < size)) for part, size in zip(box, self.array.shape, strict=True)]
        pads[0] = (0, 0)
        first = [part.start - pad[0] for part, pad in zip(box, pads, strict=True)]
        mask = np.pad(mask, pads).astype(np.int8)
        points, outward = [], []
        for axis, normal in ((1, (0.0, 1.0)), (2, (-1.0, 0.0))):
            # +1: the inside begins, so that the outside lies towards smaller indices: superior, or anterior.
            change = np.diff(mask, axis=axis)
            index = np.argwhere(change)
            points.append((index + first + 0.5 * (np.arange(3) == axis)) * self.spacing)
            outward.append(change[tuple(index.T)][:, None] * self.spacing[axis] * np.array(normal))
        slices, rows, columns = np.concatenate(points).T
        return _Steps(np.stack([slices, columns, -rows], axis=1), np.concatenate(outward), self.pixel_mm)

    def band(self, steps: _Steps, middle_mm: float) -> _Steps:
        """The steps of the slices around the middle: three slices at least, for their own curvature."""
        taken = np.abs(steps.points[:, 0] - middle_mm) <= self.band_mm
        return _Steps(steps.points[taken], steps.outward[taken], self.pixel_mm)

    @property
    def band_mm(self) -> float:
        return max(_BAND_MM, 1.5 * float(self.spacing[0]))

    def middle(self, z: float) -> float | None:
        """x of the canal's plane of symmetry at a height; None where there is no canal.

        Across an ellipse, the square of its antero-posterior extent is a parabola, whose apex is the middle even where
        the slices cover only a side of the canal. What is no ellipse has the middle of its area.
        """
        if self.canal_mask is None:
            return None
        row = -z / self.spacing[1] - self.canal_box[1].start
        half = _MIDLINE_STRETCH_MM / self.spacing[1]
        low, high = (int(np.clip(round(value), 0, self.canal_mask.shape[1])) for value in (row - half, row + half + 1))
        extent = self.canal_mask[:, low:high].sum(axis=2, dtype=np.float64)
        extent = extent[:, extent.any(axis=0)]
        if not extent.size:
            return None
        squares, area = np.square(extent).mean(axis=1), extent.sum(axis=1)
        x = (self.canal_box[0].start + np.arange(len(squares))) * self.spacing[0]
        centre = float(x @ area / area.sum())
        seen = squares > 0
        if seen.sum() >= 3:
            curve = np.polyfit(x[seen] - centre, squares[seen], 2)
            if curve[0] < 0:
                apex = -curve[1] / (2 * curve[0])
                ends = self.canal_box[0].start + np.flatnonzero(seen)[[0, -1]]
                goes_on = ends[0] == 0 or ends[1] == self.array.shape[0] - 1
                falls = squares[seen].min() < squares.max() / 2
                if x[seen][0] <= centre + apex <= x[seen][-1] or (goes_on and falls):
                    return centre + float(apex)
        return centre

    def holds(self, x: float) -> bool:
        """Whether a slice covers this x."""
        return bool(abs(x / self.spacing[0] - (self.array.shape[0] - 1) / 2) <= self.array.shape[0] / 2)

    def parts(self) -> list[_Part]:
        """Discs and vertebrae in the order of the spine, from the lowest up."""
        places = []  # disc n stands before vertebra n, which it lies below
        for label in self.boxes:
            if label > DISC_OFFSET:
                places.append((label - DISC_OFFSET, "disc", label))
            elif label not in (CANAL_ID, DISC_OFFSET):
                places.append((label % PARTIAL_OFFSET, "vertebra", label))
        return [self._part(structure, number, label) for number, structure, label in sorted(places)]

    def _part(self, structure: str, number: int, label: int) -> _Part:
        slices, rows, columns = box = self.boxes[label]
        z = -(rows.start + rows.stop - 1) / 2 * self.spacing[1]
        middle = self.middle(z)
        note = "" if middle is not None else _OWN_MIDDLE
        if middle is None:
            middle = float(np.argwhere(self.array[box] == label)[:, 0].mean() + slices.start) * self.spacing[0]
        nowhere = partial(_Part, structure, number, None, middle, None)
        cut = PARTIAL_OFFSET < label < DISC_OFFSET
        if not self.holds(middle):
            return nowhere(_CUT if cut else _OUTSIDE)
        near = np.abs(np.arange(slices.start, slices.stop) * self.spacing[0] - middle) <= self.band_mm
        if not near.any():
            return nowhere(_CUT if cut else _TOO_FEW)
        first, last = np.flatnonzero(near)[[0, -1]]
        box = (slice(slices.start + int(first), slices.start + int(last) + 1), rows, columns)
        mask = self.array[box] == label
        if structure == "vertebra":
            mask &= self._before_canal(box)
        mask = _largest(mask)
        if np.count_nonzero(mask) < _FEWEST:
            return nowhere(_CUT if cut else _TOO_FEW)
        _, row, column = np.argwhere(mask).T
        row, column = row + rows.start, column + columns.start
        centroid = (float(column.mean() * self.spacing[2]), float(-row.mean() * self.spacing[1]))
        ends = (row.min(), self.array.shape[1] - 1 - row.max(), column.min(), self.array.shape[2] - 1 - column.max())
        if cut or min(ends) == 0:
            return _Part(structure, number, centroid, middle, None, _CUT)
        return _Part(structure, number, centroid, middle, self.steps(mask, box), note)

    def _before_canal(self, box: tuple[slice, ...]) -> np.ndarray:
        """bool (1, rows, columns) of a box: in front of the canal's middle, where the posterior elements are not."""
        columns = np.arange(box[2].start, box[2].stop)
        if self.canal_mask is None:
            return np.ones((1, 1, len(columns)), bool)
        _, rows, across = self.canal_box
        near = slice(max(0, box[0].start - self.canal_box[0].start), max(0, box[0].stop - self.canal_box[0].start))
        extent = self.canal_mask[near].sum(axis=0)
        area = extent.sum(axis=1)
        seen = np.flatnonzero(area)
        if not len(seen):
            return np.ones((1, 1, len(columns)), bool)
        middle = (extent @ np.arange(across.start, across.stop))[seen] / area[seen]
        limit = np.interp(np.arange(box[1].start, box[1].stop), seen + rows.start, middle)
        return (columns < limit[:, None])[None]


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest piece of a bool mask, its holes filled slice by slice."""
    labels, count = ndimage.label(mask)
    if count > 1:
        mask = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    # Of a plane with a margin, all but its outside is the piece with its holes. (Far faster than SciPy's own filling.)
    outside, _ = ndimage.label(~np.pad(mask, ((0, 0), (1, 1), (1, 1))), _IN_PLANE)
    return (outside != outside[:, :1, :1])[:, 1:-1, 1:-1]


# --- Measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outline:
    """The four walls of a body or disc in its own frame, as polynomials over the other axis."""

    frame: _Frame
    lower: np.ndarray
    upper: np.ndarray
    front: np.ndarray
    back: np.ndarray
    depth: float  # places the heights

    def slope(self, plate: np.ndarray) -> float:
        """Tilt (radians) of an endplate: of the straight line through its points at the same distance either side."""
        return self.frame.tilt + math.atan(_slope(plate, HEIGHTS["posterior"] * self.depth))


def _neighbours(parts: list[_Part], place: int) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """The centroids of the next part below, or its own at the end, and above."""
    known = [part.centroid for part in parts[max(0, place - 1) : place + 2] if part.centroid]
    return (known[0], known[-1]) if known else (None, None)


def _outline(scan: _Scan, part: _Part, below, above) -> _Outline | None:
    """The frame halfway between both endplates, found by turning it until they lie alike, and the walls in it."""
    if part.steps is None:
        return None
    tilt = math.atan2(below[0] - above[0], above[1] - below[1]) if above != below else 0.0
    frame = _Frame(*part.centroid, tilt)
    depth = float(np.ptp(frame.to_local(part.steps.points[:, 1:])[:, 0]))
    along = _STRETCH * depth
    for _ in range(_ROUNDS):
        lower, upper = (part.steps.wall(frame, part.middle_mm, 1, side, along) for side in (-1, 1))
        if lower is None or upper is None or upper[0] <= lower[0]:
            return None
        height, walls = upper[0] - lower[0], []
        for side in (-1, 1):
            # A wedge has less wall at one end; beyond it, the stretch would hold steps of the endplates.
            wall_mm = min(_at(upper, u) - _at(lower, u) for u in (side * along, side * depth / 2))
            stretch = max(min(_STRETCH * wall_mm, wall_mm / 2 - 0.6 * scan.pixel_mm), 0.75 * scan.pixel_mm)
            walls.append(part.steps.wall(frame, part.middle_mm, 0, side, stretch, from_mm=0.3 * depth))
        front, back = walls
        if front is None or back is None:
            return None
        depth = narrow = float(back[0] - front[0])
        if part.structure == "vertebra":
            # The mean of both ends of the waist, unless it flares into osteophytes.
            ends = (-_STRETCH * height, _STRETCH * height)
            wide = float(np.mean([_at(back, w) - _at(front, w) for w in ends]))
            depth = float(np.clip(wide, narrow, 1.08 * narrow))
        # Long stretches tell a tilt better, but the walls must stay out, a waist's among them, and the round corners.
        along = min(_PLATE_STRETCH * depth, narrow / 2 - max(scan.pixel_mm, _CORNER_MM))
        outline = _Outline(frame, lower, upper, front, back, depth)
        tilt = frame.tilt + sum(math.atan(_slope(plate, HEIGHTS["posterior"] * depth)) for plate in (lower, upper)) / 2
        frame = _Frame(*frame.to_plane((front[0] + back[0]) / 2, (lower[0] + upper[0]) / 2), tilt)
    return outline


def _chords(scan: _Scan, part: _Part, outline: _Outline | None) -> list[Measurement]:
    prefix = "body_" if part.structure == "vertebra" else ""
    names = [f"{prefix}height_{place}" for place in HEIGHTS] + [f"{prefix}depth", "canal_ap"]
    if outline is None:
        note = part.note if part.steps is None else _NO_OUTLINE
        return [Measurement(part.structure, part.number, name, math.nan, "mm", (), note) for name in names]
    frame = outline.frame

    def chord(name: str, first, last, middle_mm: float, steps: _Steps) -> Measurement:
        places = [frame.to_plane(*end) for end in (first, last)]
        ends = tuple(scan.lps((middle_mm, *place)) for place in places)
        doubtful = max(map(steps.distance, places)) > _OFF_PIXELS * scan.pixel_mm
        note = "; ".join(filter(None, (part.note, _OFF if doubtful else "")))
        return Measurement(part.structure, part.number, name, math.dist(first, last), "mm", ends, note)

    found = []
    for name, share in zip(names, HEIGHTS.values(), strict=False):
        u = share * outline.depth
        found.append(chord(name, (u, _at(outline.lower, u)), (u, _at(outline.upper, u)), part.middle_mm, part.steps))
    walls = (_at(outline.front, 0), 0.0), (_at(outline.back, 0), 0.0)
    found.append(chord(names[3], *walls, part.middle_mm, part.steps))
    canal = _canal_walls(scan, outline)
    if canal is None:
        return [*found, Measurement(part.structure, part.number, names[4], math.nan, "mm", (), _NO_CANAL)]
    middle, front, back = canal
    return [*found, chord(names[4], (front, 0.0), (back, 0.0), middle, scan.canal_steps)]


def _canal_walls(scan: _Scan, outline: _Outline) -> tuple[float, float, float] | None:
    """x of the canal's middle behind a body or disc, and u of its front and back wall there; None where it has none."""
    if scan.canal_steps is None:
        return None
    frame = outline.frame
    middle = scan.middle(frame.to_plane(outline.depth / 2 + 10, 0.0)[1])
    if middle is None or not scan.holds(middle):
        return None
    steps = scan.band(scan.canal_steps, middle)
    # From the middle of the canal, so that one wall lies before and the other behind it.
    u, w = frame.to_local(steps.points[:, 1:]).T
    near = (np.abs(w) <= _CANAL_STRETCH_MM) & (u > 0)
    if not near.any():
        return None
    centre = float(u[near].mean())
    own = _Frame(*frame.to_plane(centre, 0.0), frame.tilt)
    walls = [steps.wall(own, middle, 0, side, _CANAL_STRETCH_MM, across=2) for side in (-1, 1)]
    if any(wall is None for wall in walls):
        return None
    front, back = (centre + float(wall[0]) for wall in walls)
    return middle, front, back


def _lordosis(scan: _Scan, parts: list[_Part], outlines: list[_Outline | None]) -> Measurement:
    lumbar = [
        (part, outline)
        for part, outline in zip(parts, outlines, strict=True)
        if part.structure == "vertebra" and part.number <= LUMBAR and outline is not None
    ]
    if len(lumbar) < 2:
        return Measurement("spine", None, "lordosis", math.nan, "degrees", (), "fewer than two whole lumbar bodies")
    (lowest, below), (highest, above) = lumbar[0], lumbar[-1]
    degrees = math.degrees(below.slope(below.lower) - above.slope(above.upper))

    def line(part: _Part, outline: _Outline, plate: np.ndarray) -> tuple:
        reach = HEIGHTS["posterior"] * outline.depth
        middle, slope = (_at(plate, reach) + _at(plate, -reach)) / 2, _slope(plate, reach)
        at = [outline.frame.to_plane(u, middle + slope * u) for u in (-outline.depth / 2, outline.depth / 2)]
        return tuple(scan.lps((part.middle_mm, *point)) for point in at)

    names = [f"L{LUMBAR + 1 - part.number}" for part in (highest, lowest)]
    note = (
        f"upper endplate of vertebra {highest.number} to lower endplate of vertebra {lowest.number}: "
        f"{names[0]} to {names[1]}, if vertebra 1 is L{LUMBAR}"
    )
    ends = (line(highest, above, above.upper), line(lowest, below, below.lower))
    return Measurement("spine", None, "lordosis", degrees, "degrees", ends, note)
