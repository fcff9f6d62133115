"""Class labels -> SPIDER's instance labels: vertebrae 1.. and discs 201.. from the lowest up, canal 100.

The discs are the ruler. Disc voxels are projected onto a smooth curve along the spine, and every heap of them is a
level: pieces of one disc fall on one heap, two discs that touch on two. A plane is fitted to each level; disc voxels go
to the nearest plane, and a vertebra is what lies between two of them. Behind the canal the border drops below the
plane, as the joints and processes of a vertebra lie lower than its body. Vertebral voxels well away from the borders
are sure; the rest of a connected piece follows the nearest of them, by a path inside the piece. So a piece that only
reaches across a border stays whole, and bodies, facets or processes that touch are cut at the level of the disc.

What holds of every result:

- Each voxel keeps its class: `LabelTable.classes(label_instances(classes, ...))` is `classes`. Specks and other pieces
  that are no vertebra or disc of their own join that of their level; nothing is dropped.
- Disc 200 + n lies directly below vertebra n. A level whose disc or vertebra is missing from the classes keeps its
  number, so the others still correspond; this also goes for the topmost disc, whose vertebra the upper edge may hide.
  Gaps are told by the usual distance of discs: where most of these lack their neighbours, levels are lost.
- Number 1 is the lowest vertebra in view: L5 above the sacrum, which is not labelled. If the lower edge cuts the spine,
  a vertebra without a disc below it is number 1, and there is no disc 201. A disc with no vertebra above it below all
  others (a remnant within the sacrum) is no level: it joins disc 201.

Geometry is in mm; arrays are sagittal, (slice, row, column), see `imaging.SAGITTAL_AXES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lumbarflow.labels import CANAL_ID, CLASSES, DISC_OFFSET

_VERTEBRA, _CANAL, _DISC = (CLASSES.index(name) for name in ("vertebrae", "canal", "IVD"))

# SPIDER's ids end at 25 and 225. No spine has more levels; what is no spine must not run into the canal's id.
_MOST = 25
# Lumbar bodies are 25-30 mm high and discs 7-12 mm: a level's height where there are too few to measure it.
_LEVEL_MM = 36.0
# Less is a speck: a cube of 5 mm. The smallest disc that a narrow stack of slices shows is about ten times as large.
_SPECK_MM3 = 125.0
# A disc inside the field of view reaches this share of the median one; worn discs keep a third or more of it.
_LEAST_SHARE = 1 / 8
# Two discs keep at least a collapsed vertebral body (a third of its height) between their middles.
_LEAST_DISTANCE_MM = 12.0
# Behind the posterior wall: the canal's middle, where the border begins to drop, and the spinous processes, where it
# has dropped by a share of the level's height, give or take another; further back it follows the processes' slope.
_DROP_FROM_MM, _DROP_TO_MM = 8.0, 25.0
_DROP, _DROP_RANGE, _SLOPE = 0.3, 0.3, 0.15
# Sure voxels keep this share of the level's height away from the borders: half of the level is sure.
_UNSURE = 1 / 4


@dataclass(frozen=True)
class _Plane:
    """The middle of a disc, seen or (`seen` False) interpolated.

    `centre` is (slice, row, column) in mm; `up` the unit normal; `back` the unit vector in the plane and in the
    sagittal one, to posterior; `half_depth` half of the disc's depth (mm).
    """

    centre: np.ndarray
    up: np.ndarray
    back: np.ndarray
    half_depth: float
    seen: bool = True

    @classmethod
    def at(cls, centre, up, half_depth: float, seen: bool = True) -> _Plane:
        up = up / np.linalg.norm(up)
        back = np.array([0.0, up[2], -up[1]]) / np.hypot(up[1], up[2])
        return cls(np.asarray(centre, np.float64), up, back, float(half_depth), seen)

    def height(self, points: np.ndarray) -> np.ndarray:
        """Signed height (mm) of points (3, n) above the plane."""
        return self.up.astype(points.dtype) @ points - points.dtype.type(self.centre @ self.up)

    def behind(self, points: np.ndarray) -> np.ndarray:
        """How far (mm) points (3, n) lie behind the disc's posterior wall."""
        return self.back.astype(points.dtype) @ points - points.dtype.type(self.centre @ self.back + self.half_depth)


def label_instances(classes: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Number the vertebrae and discs of one volume; see the head of this module for the rules.

    Args:
        classes: uint8 (slice, row, column), values 0..3 as in `labels.CLASSES`.
        spacing_mm: distance between voxel centres along slice, row and column.
    Returns:
        uint8, same shape: vertebrae 1.., canal 100, discs 201.., background 0. Without any disc there is nothing to
        count by: all vertebrae are 1.
    Raises:
        ValueError: not 3-D, values that are no class, or a spacing that isn't positive.
    """
    classes, spacing = np.asarray(classes), np.asarray(spacing_mm, np.float64)
    if classes.ndim != 3 or classes.dtype.kind not in "ui" or (classes.size and classes.max() >= len(CLASSES)):
        raise ValueError(
            f"found an array of {classes.ndim} axes and dtype {classes.dtype} with values up to "
            f"{classes.max(initial=0)}; expected (slice, row, column) with classes 0..{len(CLASSES) - 1}. "
            "Map label ids to classes first."
        )
    if spacing.shape != (3,) or not np.all(spacing > 0):
        raise ValueError(f"found spacing_mm {spacing_mm}; expected three distances above 0 (slice, row, column).")
    instances = np.zeros(classes.shape, np.uint8)
    box = _box(classes)
    if box is None:
        return instances
    # Contiguous, so that the same voxels come in the same order whatever the array's strides.
    cut = np.ascontiguousarray(classes[box], np.uint8)
    edges = (box[1].start == 0, box[1].stop == classes.shape[1])
    instances[box] = _label(cut, spacing, edges)
    return instances


def count_instances(instances: np.ndarray) -> tuple[int, int]:
    """Vertebrae and discs in an array of instance labels: how many different ids of each there are."""
    ids = np.flatnonzero(np.bincount(np.ravel(instances), minlength=1))
    return int(np.sum((ids > 0) & (ids < CANAL_ID))), int(np.sum(ids > DISC_OFFSET))


def _box(classes: np.ndarray) -> tuple[slice, slice, slice] | None:
    found = [np.flatnonzero(classes.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    return tuple(slice(int(a[0]), int(a[-1]) + 1) for a in found) if len(found[0]) else None


def _label(classes: np.ndarray, spacing: np.ndarray, edges: tuple[bool, bool]) -> np.ndarray:
    """The same for an array cropped to its foreground; `edges`: whether it reaches the image's upper, lower edge."""
    instances = np.where(classes == _CANAL, CANAL_ID, 0).astype(np.uint8)
    discs, vertebrae = (np.array(np.nonzero(classes == value)) for value in (_DISC, _VERTEBRA))
    if discs.size == 0:
        instances[tuple(vertebrae)] = 1
        return instances
    disc_mm, vertebra_mm = ((index * spacing[:, None]).astype(np.float32) for index in (discs, vertebrae))
    planes = _planes(classes, discs, disc_mm, spacing, edges)
    planes = _without_sacral_remnant(planes, vertebra_mm, spacing)
    level_mm = _level_mm(planes)
    planes = _with_missing(planes, level_mm)
    if _vertebra_below(planes[0], vertebra_mm, level_mm, spacing, edges[1], classes.shape[1]):
        planes = [_moved(planes[0], -level_mm), *planes]

    seen = np.flatnonzero([plane.seen for plane in planes])
    nearest = np.argmin([np.abs(planes[i].height(disc_mm)) for i in seen], axis=0)
    instances[tuple(discs)] = DISC_OFFSET + np.minimum(seen[nearest] + 1, _MOST)
    # Processes of the next two vertebrae may reach into view from above.
    planes = [*planes, _moved(planes[-1], level_mm), _moved(planes[-1], 2 * level_mm)]
    if vertebrae.size:
        instances[tuple(vertebrae)] = _vertebrae(classes, vertebrae, vertebra_mm, planes, level_mm, spacing)
    return instances


# --- Levels ---------------------------------------------------------------------------------------------------------


def _planes(classes, discs, disc_mm, spacing, edges) -> list[_Plane]:
    """The planes of the discs, from the lowest up; at least one."""
    from scipy import ndimage

    voxel = float(np.prod(spacing))
    pieces = ndimage.label(classes == _DISC, np.ones((3, 3, 3)))[0][tuple(discs)]
    volumes = np.bincount(pieces) * voxel
    solid = volumes[pieces] >= min(_SPECK_MM3, volumes[1:].max())
    along, slope = _spine(classes, disc_mm[:, solid], spacing)
    heaps = _heaps(along)

    # Rubbish inside a body makes a small heap too; at the edges of the image a real disc may be cut as small.
    rows = discs[1, solid]
    sizes = np.bincount(heaps) * voxel
    at_edge = np.zeros(len(sizes), bool)
    at_edge[heaps[edges[0] & (rows == 0) | edges[1] & (rows == classes.shape[1] - 1)]] = True
    kept = np.flatnonzero(at_edge | (sizes >= _LEAST_SHARE * np.median(sizes)))
    points = disc_mm[:, solid][:, np.isin(heaps, kept)].astype(np.float64)
    member = np.searchsorted(kept, heaps[np.isin(heaps, kept)])
    # The curve runs downwards in (row, column); its perpendicular in the plane points up.
    ups = [np.array([0.0, -1.0, -slope[heaps == heap].mean()]) for heap in kept]
    for _ in range(3):
        planes = [_fit(points[:, member == i], ups[i]) for i in range(len(ups)) if np.any(member == i)]
        ups = [plane.up for plane in planes]
        member = np.argmin([np.abs(plane.height(points)) for plane in planes], axis=0)
    return planes


def _spine(classes, points, spacing) -> tuple[np.ndarray, np.ndarray]:
    """Where disc voxels (3, n) lie along the spine (mm, upwards from 0), and the slope d column / d row there.

    The curve is a cubic through the canal, which follows the discs without a gap; where there is too little of it,
    through all that is labelled. It is moved forward onto the discs.
    """
    rows, columns = (np.arange(count) * mm for count, mm in zip(classes.shape[1:], spacing[1:], strict=True))
    row, offset = points[1:].astype(np.float64)
    for mask in (classes == _CANAL, classes > 0):
        counts = mask.sum(axis=0, dtype=np.int64)
        weights = counts.sum(axis=1)
        used = weights > 0
        if used.sum() * spacing[1] >= max(np.ptp(row), _LEVEL_MM) / 2:
            break
    centres = counts[used] @ columns / weights[used]
    curve = np.polynomial.Polynomial.fit(
        rows[used], centres, min(3, int(used.sum()) - 1), w=np.sqrt(weights[used]), domain=[0, rows[-1] + 1]
    )
    # Beyond the rows of the canal a cubic goes astray: it is continued straight.
    first, last = rows[used][0], rows[used][-1]

    def column(row):
        inside = np.clip(row, first, last)
        return curve(inside) + curve.deriv()(inside) * (row - inside)

    offset = offset - column(row)
    offset -= np.median(offset)
    slope = curve.deriv()(np.clip(row, first, last))
    foot = row + offset * slope / (1 + np.square(slope))
    grid = np.arange(foot.min() - 1, foot.max() + 2)
    length = np.cumsum(np.hypot(1, curve.deriv()(np.clip(grid, first, last))))
    along = np.interp(foot, grid, length)
    return along.max() - along, slope


def _heaps(along: np.ndarray) -> np.ndarray:
    """Positions (n,) in mm -> the number, upwards from 0, of the heap that each belongs to."""
    from scipy import ndimage

    profile = np.bincount(along.astype(np.int64) + 1, minlength=int(along.max()) + 3).astype(np.float64)
    profile = ndimage.gaussian_filter1d(np.pad(profile, 6), 2.0)  # mm: the roughness of a few slices
    inner = profile[1:-1]
    peaks = 1 + np.flatnonzero((inner > profile[:-2]) & (inner >= profile[2:]))
    chosen: list[int] = []
    for peak in sorted(peaks.tolist(), key=lambda peak: (-profile[peak], peak)):
        if all(abs(peak - other) >= _LEAST_DISTANCE_MM for other in chosen):
            chosen.append(peak)
    chosen.sort()
    cuts = [low + int(np.argmin(profile[low:high])) - 7 for low, high in zip(chosen, chosen[1:], strict=False)]
    return np.searchsorted(np.array(cuts), along)


def _fit(points: np.ndarray, up: np.ndarray) -> _Plane:
    """The plane of one disc's voxels (3, n), from a first idea of its normal.

    Its tilt comes from a regression of height on depth and width. A ridge of (3 mm)^2, little against a whole disc's
    variance (about 100 mm2 in depth), holds the first idea where there is only a scrap of the disc.
    """
    centre = points.mean(axis=1)
    plane = _Plane.at(centre, up, 0.0)
    for _ in range(2):
        axes = np.stack([plane.behind(points), points[0] - centre[0]])
        covariance, slant = axes @ axes.T / axes.shape[1], axes @ plane.height(points) / axes.shape[1]
        tilts = np.linalg.solve(covariance + 9.0 * np.eye(2), slant)
        plane = _Plane.at(centre, plane.up - tilts[0] * plane.back - tilts[1] * np.array([1.0, 0.0, 0.0]), 0.0)
    # Half the depth of an ellipse is twice the deviation of its points.
    return replace(plane, half_depth=2 * float(np.std(plane.behind(points))))


def _moved(plane: _Plane, distance_mm: float) -> _Plane:
    return replace(plane, centre=plane.centre + distance_mm * plane.up, seen=False)


def _distances(planes: list[_Plane]) -> np.ndarray:
    return np.linalg.norm(np.diff([plane.centre for plane in planes], axis=0), axis=1)


def _level_mm(planes: list[_Plane]) -> float:
    return max(_LEAST_DISTANCE_MM, float(np.median(_distances(planes)))) if len(planes) > 1 else _LEVEL_MM


def _body_mm3(vertebra_mm, spacing, below: _Plane, above: _Plane | None = None, margin_mm: float = 0.0) -> float:
    """Volume of the vertebral voxels straight above a disc, to the next one."""
    inside = (below.height(vertebra_mm) > margin_mm) & (below.behind(vertebra_mm) < 0)
    if above is not None:
        inside &= above.height(vertebra_mm) < -margin_mm
    return float(np.count_nonzero(inside) * np.prod(spacing))


def _without_sacral_remnant(planes, vertebra_mm, spacing) -> list[_Plane]:
    """Discs below the lowest vertebra, but for the one that it stands on, are none."""
    bodies = [_body_mm3(vertebra_mm, spacing, *pair) for pair in zip(planes, planes[1:], strict=False)]
    least = max(_SPECK_MM3, _LEAST_SHARE * float(np.median(bodies))) if bodies else 0.0
    lowest = next((i for i, body in enumerate(bodies) if body >= least), 0)
    return planes[lowest:]


def _with_missing(planes: list[_Plane], level_mm: float) -> list[_Plane]:
    """Fill in planes where two discs are more than one and a half levels apart: the one between was not found."""
    filled = planes[:1]
    for above, distance in zip(planes[1:], _distances(planes), strict=True):
        steps, below = int(distance / level_mm + 0.5), filled[-1]
        for share in np.arange(1, steps) / max(steps, 1):
            centre, up, half_depth = (
                (1 - share) * getattr(below, name) + share * getattr(above, name)
                for name in ("centre", "up", "half_depth")
            )
            filled.append(_Plane.at(centre, up, half_depth, seen=False))
        filled.append(above)
    return filled


def _vertebra_below(lowest: _Plane, vertebra_mm, level_mm, spacing, at_edge: bool, rows: int) -> bool:
    """Whether a vertebral body lies below the lowest disc: one that the lower edge cuts, or half a one at least."""
    under = replace(lowest, up=-lowest.up)
    body = _body_mm3(vertebra_mm, spacing, under, margin_mm=_UNSURE * level_mm)
    if at_edge and body >= _SPECK_MM3:
        inside = (under.height(vertebra_mm) > 0) & (under.behind(vertebra_mm) < 0)
        if np.any(vertebra_mm[1, inside] > (rows - 1.5) * spacing[1]):
            return True
    above = _body_mm3(vertebra_mm, spacing, lowest, _moved(lowest, level_mm))
    return body >= max(_SPECK_MM3, above / 2)


# --- Vertebrae ------------------------------------------------------------------------------------------------------


def _vertebrae(classes, index, points, planes, level_mm, spacing) -> np.ndarray:
    """uint8 (n,): the vertebra of each vertebral voxel; `index` (3, n) is its place, `points` the same in mm."""
    from scipy import ndimage

    behind = [plane.behind(points) for plane in planes]
    heights = [
        plane.height(points) + _SLOPE * np.maximum(back - _DROP_TO_MM, 0)
        for plane, back in zip(planes, behind, strict=True)
    ]
    drops = _drops_mm([height[back > _DROP_TO_MM] for height, back in zip(heights, behind, strict=True)], level_mm)
    level = np.zeros(points.shape[1], np.intp)
    margin = np.full(points.shape[1], np.inf, np.float32)
    for height, back, drop in zip(heights, behind, drops, strict=True):
        height += drop * np.clip((back - _DROP_FROM_MM) / (_DROP_TO_MM - _DROP_FROM_MM), 0, 1)
        level += height > 0
        np.minimum(margin, np.abs(height), out=margin)
    level = np.maximum(level, 1)  # the processes of the lowest vertebra hang below its disc
    sure = margin > _UNSURE * level_mm

    pieces, count = ndimage.label(classes == _VERTEBRA, np.ones((3, 3, 3)))
    pieces = pieces[tuple(index)] - 1
    levels = len(planes) + 1
    votes, sure_votes = (
        np.bincount(pieces[chosen] * levels + level[chosen], minlength=count * levels).reshape(count, levels)
        for chosen in (slice(None), sure)
    )
    certain = sure_votes * np.prod(spacing) >= _SPECK_MM3
    # One vertebra, if not more is certain: that with most of the sure voxels, or of all.
    single = np.where(sure_votes.any(axis=1), sure_votes.argmax(axis=1), votes.argmax(axis=1))
    result = single[pieces]
    shared = certain.sum(axis=1)[pieces] > 1
    if shared.any():
        known = np.where(sure & certain[pieces, level], level, 0)[shared]
        result[shared] = _nearest_by_path(classes.shape, index[:, shared], known, level[shared], spacing)

    # Specks from above are no vertebra in view: they join the highest one that has more.
    whole = votes.sum(axis=1) * np.prod(spacing) >= _SPECK_MM3
    volumes = np.bincount(result[whole[pieces]], minlength=levels) * np.prod(spacing)
    if np.any(volumes >= _SPECK_MM3):
        result = np.minimum(result, np.flatnonzero(volumes >= _SPECK_MM3)[-1])
    return np.minimum(result, _MOST).astype(np.uint8)


def _drops_mm(heights: list[np.ndarray], level_mm: float) -> list[float]:
    """How far the borders between spinous processes lie below the discs' planes: where there is least bone.

    Args:
        heights: of each plane from the lowest up, (n,): how high (mm) the voxels of all processes lie above it.
    """
    from scipy import ndimage

    drops = np.arange(int((_DROP - _DROP_RANGE) * level_mm), int((_DROP + _DROP_RANGE) * level_mm) + 1)
    bone = np.stack([np.histogram(-height, len(drops), (drops[0] - 0.5, drops[-1] + 0.5))[0] for height in heights])
    bone = ndimage.gaussian_filter1d(bone.astype(np.float64), 1.0)
    # Among gaps the usual drop counts, and that neighbours drop alike: half a level off weighs as much as bone.
    cost = bone / np.maximum(bone.mean(axis=1, keepdims=True), 1.0) + np.square((drops / level_mm - _DROP) / 0.5)
    unlike = np.square((drops[:, None] - drops) / (0.5 * level_mm))
    paths = []
    total = cost[0]
    for row in cost[1:]:  # Viterbi's algorithm
        paths.append(np.argmin(total + unlike, axis=1))
        total = row + np.min(total + unlike, axis=1)
    chosen = [int(np.argmin(total))]
    for path in reversed(paths):
        chosen.append(int(path[chosen[-1]]))
    return [float(drops[i]) for i in reversed(chosen)]


def _nearest_by_path(shape, index, known, otherwise, spacing) -> np.ndarray:
    """Spread labels through a set of voxels along its inside.

    Args:
        shape: of the array that `index` (3, n) points into.
        known: int (n,), labels to spread, 0 where unknown.
        otherwise: int (n,), labels where no path leads to a known one.
    Returns:
        int (n,): of every voxel, the label that the shortest path (mm) leads to; the lower of equals.
    """
    from scipy import sparse

    number = np.full(shape, -1, np.int32)
    unknown = known == 0
    number[tuple(index[:, unknown])] = np.arange(np.count_nonzero(unknown))
    labels = np.zeros(shape, np.uint8)
    labels[tuple(index)] = known

    starts: dict[int, list[np.ndarray]] = {int(value): [] for value in np.unique(known) if value}
    links = []
    for axis in range(3):
        low, high = (
            tuple(part if other == axis else slice(None) for other in range(3))
            for part in (slice(None, -1), slice(1, None))
        )
        one, other = number[low], number[high]
        both = (one >= 0) & (other >= 0)
        links.append((one[both], other[both], np.full(np.count_nonzero(both), spacing[axis])))
        for mine, theirs in ((one, labels[high]), (other, labels[low])):
            touching = (mine >= 0) & (theirs > 0)
            for value in starts:
                starts[value].append(mine[touching & (theirs == value)])
    first, second, lengths = (np.concatenate(parts) for parts in zip(*links, strict=True))
    nodes = np.count_nonzero(unknown)
    graph = sparse.csr_array((lengths, (first, second)), (nodes, nodes))
    result, best = otherwise[unknown].copy(), np.full(nodes, np.inf)
    for value, found in starts.items():
        sources = np.unique(np.concatenate(found))
        if len(sources) == 0:
            continue
        distances = sparse.csgraph.dijkstra(graph, directed=False, indices=sources, min_only=True)
        # Rounded: sums of the same steps in another order are equal.
        distances = np.round(distances, 3)
        nearer = distances < best
        result[nearer], best[nearer] = value, distances[nearer]
    everywhere = known.copy()
    everywhere[unknown] = result
    return everywhere
