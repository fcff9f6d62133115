"""Synthetic lumbar MRI with known anatomy.

A patient is a set of analytic surfaces in LPS physical space (mm): a column of vertebrae and discs on a sacrum, the
spinal canal behind it, and the soft tissue around. Every series of a patient samples the same surfaces on a grid of
its own, so that image, mask and `anatomy` agree whatever the matrix, spacing, storage order or direction.

The sagittal shape is drawn in the plane (y, z) and follows the patient's mid-surface x = midline(z), a slight lateral
curve; `x` inside this module is the distance from that surface. Sagittal arrays are (slice, row, column), as
`imaging.SAGITTAL_AXES` has them.

Labels are SPIDER's: vertebrae 1.. from the lowest (L5) up, 100 + n for a vertebra n that the upper edge cuts, canal
100, discs 201.. from the lowest up, background 0. The sacrum is not labelled, as in SPIDER.

Source: proportions follow textbook morphometry of adults, rounded; they make no claim on any population. The grades
of disc degeneration imitate Pfirrmann et al., Spine 26:1873, 2001.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from lumbarflow.cohort import SYNTHETIC_MARK
from lumbarflow.imaging import SAGITTAL_AXES, LabelMap, Volume
from lumbarflow.labels import CANAL_ID, DISC_OFFSET, PARTIAL_OFFSET

if TYPE_CHECKING:
    import pandas as pd

# Level: body height, depth and width (mm), height of the disc below it (mm), then the shares of the lumbar lordosis
# that its body and the disc below it wedge. The shares of L5 to L1 add up to 1; the thorax bends the other way.
_LEVELS = {
    "L5": (27.0, 35.0, 50.0, 10.0, 0.16, 0.28),
    "L4": (27.5, 35.0, 48.0, 11.5, 0.06, 0.20),
    "L3": (28.0, 34.5, 46.0, 11.0, 0.00, 0.16),
    "L2": (28.0, 34.0, 44.0, 10.5, -0.02, 0.12),
    "L1": (27.0, 32.5, 42.0, 9.5, -0.04, 0.08),
    "T12": (26.0, 31.0, 40.0, 8.0, -0.05, 0.00),
    "T11": (24.5, 30.0, 37.0, 7.0, -0.06, -0.01),
    "T10": (23.5, 29.5, 35.0, 6.5, -0.06, -0.01),
    "T9": (22.5, 29.0, 33.0, 6.2, -0.06, -0.01),
    "T8": (22.0, 28.5, 32.0, 6.0, -0.06, -0.01),
    "T7": (21.5, 28.0, 31.0, 6.0, -0.06, -0.01),
}
_LUMBAR_LEVELS = 5

# Sacral segment: height, depth above and below (mm), tilt relative to the sacral endplate (degrees).
_SACRUM = ((27.0, 33.0, 23.0, 0.0), (22.0, 22.0, 16.0, 2.0), (19.0, 15.0, 12.0, -8.0), (17.0, 11.0, 9.0, -22.0))

# Signal of each tissue for T1, T2 and T2 SPACE, relative to the brightest: typical looks, not a signal equation.
_SIGNAL = {
    "air": (0.01, 0.01, 0.01),
    "fat": (1.00, 0.85, 0.62),
    "skin": (0.35, 0.30, 0.25),
    "muscle": (0.33, 0.16, 0.12),
    "ligament": (0.22, 0.14, 0.12),
    "viscera": (0.42, 0.38, 0.26),
    "blood": (0.08, 0.05, 0.04),
    "fluid": (0.18, 0.95, 0.95),
    "cortex": (0.09, 0.06, 0.04),
    "marrow": (0.58, 0.42, 0.32),
    "vein": (0.36, 0.80, 0.75),
    "annulus": (0.34, 0.12, 0.09),
    "nucleus": (0.40, 0.80, 0.78),
    "csf": (0.15, 1.00, 1.10),
    "cord": (0.36, 0.40, 0.36),
}
SEQUENCES = ("t1", "t2", "t2_SPACE")

# The storage orders: the letters say towards which side of the patient the indices x, y, z grow.
STORAGE_ORDERS = tuple("".join(letters) for axes in permutations(("LR", "PA", "SI")) for letters in product(*axes))
_SAGITTAL_ORDER = "RIP"  # the letters of SAGITTAL_AXES


@dataclass(frozen=True)
class SeriesPlan:
    """All that tells one series from another; with the settings it determines every voxel.

    `size` and `spacing_mm` are (slice, row, column) of the sagittal grid, `centre_mm` its centre (LPS), `rotation_deg`
    its rotation about the patient's x, y and z axes, `storage_order` one of `STORAGE_ORDERS`. The field of view
    reaches the bodies of `vertebrae` vertebrae and holds the lowest `whole_vertebrae` of them entirely.
    """

    name: str
    patient: str
    sequence: str
    subset: str
    sex: str
    seed: int
    size: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    slice_thickness_mm: float
    centre_mm: tuple[float, float, float]
    rotation_deg: tuple[float, float, float]
    storage_order: str
    dtype: str
    intensity: float
    vertebrae: int
    whole_vertebrae: int
    discs: int

    @property
    def axes(self) -> np.ndarray:
        """(3, 3), rows: the unit vectors (LPS) of slice, row and column."""
        angles = np.deg2rad(self.rotation_deg)
        return SAGITTAL_AXES @ _rotation(angles).T

    @property
    def first_mm(self) -> np.ndarray:
        """LPS position of the centre of the first voxel of the sagittal grid."""
        half = (np.array(self.size) - 1) / 2 * np.array(self.spacing_mm)
        return np.array(self.centre_mm) - half @ self.axes


def plan_cohort(settings: dict) -> list[SeriesPlan]:
    """Plans of all series, patient by patient, drawn from `settings["seed"]`.

    Args:
        settings: the parameters `synthesize`, see conf/base/parameters_synthesize.yml.
    Raises:
        ValueError: no patient, an unknown sequence, or more vertebrae than the model has.
    """
    patients, shares = int(settings["patients"]), settings["sequences"]
    most = max(int(count) for count in settings["field_of_view"]["vertebrae"])
    if patients < 1:
        raise ValueError(f"synthesize.patients: found {patients}, expected at least 1.")
    if unknown := set(shares) - set(SEQUENCES):
        raise ValueError(
            f"synthesize.sequences: found {sorted(unknown)}, expected names among {list(SEQUENCES)}. Remove the others."
        )
    if most >= len(_LEVELS):
        raise ValueError(
            f"synthesize.field_of_view.vertebrae: found {most}, expected at most {len(_LEVELS) - 1}. Lower it."
        )
    rng = np.random.default_rng([settings["seed"], 0])

    def chosen(share: float, most: int) -> set[int]:
        # A share above 0 reaches at least one patient, so that a small cohort still has every kind.
        count = min(most, max(1, round(share * patients))) if share > 0 else 0
        return set(rng.permutation(patients)[:count].tolist())

    validation = chosen(settings["validation_share"], patients - 1)
    members = {sequence: chosen(shares.get(sequence, 0), patients) for sequence in SEQUENCES}
    return [
        _plan_series(patient, sequence, "validation" if patient in validation else "training", settings)
        for patient in range(patients)
        for sequence in SEQUENCES
        if patient in members[sequence]
    ]


def overview(plans: list[SeriesPlan]) -> pd.DataFrame:
    """The rows of overview.csv: SPIDER's columns as far as they mean something here.

    `num_vertebrae` and `num_discs` count the bodies and discs that the field of view reaches; a process of the next
    vertebra above may show without its body.
    """
    import pandas as pd

    return pd.DataFrame(
        {
            "new_file_name": plan.name,
            "num_vertebrae": plan.vertebrae,
            "num_discs": plan.discs,
            "sex": plan.sex,
            "birth_date": None,
            "subset": plan.subset,
            "BodyPartExamined": "LSPINE",
            "MRAcquisitionType": "3D" if plan.sequence == "t2_SPACE" else "2D",
            "Manufacturer": "lumbarflow phantom",
            "PixelSpacing": str(list(plan.spacing_mm[1:])),
            "SeriesDescription": SYNTHETIC_MARK,
            "SliceThickness": plan.slice_thickness_mm,
            "SpacingBetweenSlices": plan.spacing_mm[0],
        }
        for plan in plans
    )


def render(plan: SeriesPlan, settings: dict) -> tuple[Volume, LabelMap]:
    """Image and instance mask of one series, in its own storage order and direction.

    The image averages samples through the slice's thickness and softens edges over one pixel (partial volume); the
    mask holds what lies at each voxel's centre. Noise is Rician; the bias field is a posterior coil's fall-off with
    depth times a smooth polynomial.

    Returns:
        image of dtype `plan.dtype` and mask of dtype uint8, same grid.
    """
    acquisition = settings["acquisition"][_kind(plan.sequence)]
    patient = _draw_patient(plan.seed, plan.patient, settings)
    rng = np.random.default_rng([plan.seed, int(plan.patient), 2 + SEQUENCES.index(plan.sequence)])
    signal = {tissue: values[SEQUENCES.index(plan.sequence)] for tissue, values in _SIGNAL.items()}

    samples = int(acquisition["samples"])
    centre = _Canvas(plan, patient)
    textures = {name: _texture(patient.seed, centre, scales) for name, scales in _TEXTURES.items()}
    image = np.zeros(plan.size, np.float32)
    for sample in range(samples):
        shift = ((sample + 0.5) / samples - 0.5) * plan.slice_thickness_mm
        canvas = centre if abs(shift) < 1e-9 else _Canvas(plan, patient, shift)
        _paint(canvas, patient, signal, textures)
        image += canvas.values / samples
    if samples % 2 == 0:
        _paint(centre, patient, signal, textures)

    image *= _bias_field(plan, patient, centre, settings["bias"], rng)
    noise = rng.uniform(*settings["noise"])
    real, imaginary = (rng.standard_normal(plan.size, np.float32) * np.float32(noise) for _ in range(2))
    image = np.hypot(image + real, imaginary) * plan.intensity
    image = np.minimum(np.rint(image), np.iinfo(plan.dtype).max).astype(plan.dtype)
    return _stored(Volume, image, plan), _stored(LabelMap, centre.labels, plan)


def anatomy(plan: SeriesPlan, settings: dict) -> dict:
    """What is known of a patient, from the surfaces that `render` samples; the same for all series of a patient.

    All lengths are chords of the mid-sagittal surface, each given as `{"mm", "from", "to"}`: its length and its two
    ends in LPS mm. Per vertebra, in the frame whose origin is the body's centre and whose axes are the mean direction
    of its endplates (posterior) and the normal to it (superior):

    - `body_height_anterior`, `_middle`, `_posterior`: along the superior axis, through the points at -0.35, 0 and
      +0.35 of the body's nominal depth, from the lower to the upper endplate;
    - `body_depth`: along the posterior axis through the centre, from the anterior to the posterior wall;
    - `canal_ap`: on the same line, from the canal's anterior to its posterior wall;
    - `lower_tilt_deg`, `upper_tilt_deg`: of its endplates against the patient's transverse plane, positive where the
      posterior end is the higher one. The lower tilt of L5 minus the upper of L1 is the lordosis of the lumbar bodies.

    Per disc, the same in the frame halfway between its endplates: `height_anterior`, `_middle`, `_posterior`,
    `depth`, `canal_ap`, and `grade` 1 to 5 of its degeneration. `lordosis_deg` is the Cobb angle between the upper
    endplates of L1 and S1, positive for a lordosis; `endplates` gives both as their anterior and posterior ends.

    Returns:
        JSON-able dict with `patient`, `lordosis_deg`, `endplates`, `vertebrae` and `discs`; the latter two are lists
        from the lowest up, over the whole model and hence also beyond the series' field of view.
    """
    patient = _draw_patient(plan.seed, plan.patient, settings)
    lumbar_top = patient.vertebrae[_LUMBAR_LEVELS - 1]
    sacral_top = patient.sacrum[0]
    return {
        "patient": plan.patient,
        "lordosis_deg": math.degrees(sacral_top.upper.tilt - lumbar_top.upper.tilt),
        "endplates": {
            name: [patient.to_lps(*body.upper.to_plane(side * body.depth / 2, 0.0)) for side in (-1, 1)]
            for name, body in (("L1", lumbar_top), ("S1", sacral_top))
        },
        "vertebrae": [
            {
                "id": body.number,
                "level": body.level,
                "lower_tilt_deg": math.degrees(body.lower.tilt),
                "upper_tilt_deg": math.degrees(body.upper.tilt),
                "centre": patient.to_lps(body.frame.y, body.frame.z),
            }
            | _measure(patient, body.frame, body.depth, body.distance, "body_")
            for body in patient.vertebrae
        ],
        "discs": [
            {
                "id": DISC_OFFSET + disc.number,
                "level": f"{disc.above.level}/{disc.below.level}",
                "grade": disc.grade,
                "centre": patient.to_lps(disc.frame.y, disc.frame.z),
            }
            | _measure(patient, disc.frame, disc.depth, disc.distance, "")
            for disc in patient.discs
        ],
    }


# --- The patient: analytic surfaces ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """A frame of the sagittal plane: origin (y, z), axes u (posterior) and w (superior); tilt lifts the posterior."""

    y: float
    z: float
    tilt: float

    def to_local(self, y, z):
        cosine, sine = math.cos(self.tilt), math.sin(self.tilt)
        return cosine * (y - self.y) + sine * (z - self.z), cosine * (z - self.z) - sine * (y - self.y)

    def to_plane(self, u, w):
        cosine, sine = math.cos(self.tilt), math.sin(self.tilt)
        return self.y + cosine * u - sine * w, self.z + sine * u + cosine * w

    def climb(self, height: float, wedge: float) -> tuple[_Frame, _Frame]:
        """The frames halfway up and on top of a wedge that stands on this one and is higher in front."""
        middle = self.tilt - wedge / 2
        halfway = _Frame(*_Frame(self.y, self.z, middle).to_plane(0.0, height / 2), middle)
        return halfway, _Frame(*halfway.to_plane(0.0, height / 2), self.tilt - wedge)


@dataclass(frozen=True)
class _Body:
    """A vertebral body between two endplates, with the vertebra's posterior elements."""

    number: int
    level: str
    lower: _Frame
    upper: _Frame
    frame: _Frame
    height: float
    depth: float
    width: float
    taper: float  # change of the half depth per mm upwards
    waist: float  # how far the walls draw in at half height
    concavity: float  # of each endplate at its centre
    rounding: float
    arch: float = 0.0  # from the posterior wall to the front of the spinous process
    process: tuple[float, float, float] = (0.0, 0.0, 0.0)  # spinous: length, half height, slope downwards

    def above_upper(self, x, y, z):
        """Signed height above the upper endplate's surface."""
        t, m = self.upper.to_local(y, z)
        return m + self._dish(x, t)

    def below_lower(self, x, y, z):
        """Signed depth below the lower endplate's surface."""
        t, m = self.lower.to_local(y, z)
        return self._dish(x, t) - m

    def distance(self, x, y, z):
        """Signed distance to the body's surface, exact near the mid-sagittal plane, negative inside."""
        u, w = self.frame.to_local(y, z)
        bow = 1 - np.square(w * (2 / self.height))
        half = self.depth / 2 + self.taper * w - self.waist * np.maximum(bow, 0)
        wall = _superellipse(u, x, half, self.width / 2)
        plates = np.maximum(self.above_upper(x, y, z), self.below_lower(x, y, z))
        return _rounded(wall, plates, self.rounding)

    def arch_distance(self, x, y, z):
        """Signed distance to pedicles, articular pillars, laminae, transverse and spinous processes."""
        u, w = self.frame.to_local(y, z)
        u = u - self.depth / 2
        side, h = np.abs(x), self.height
        scale = self.depth / 35
        length, half_height, slope = self.process
        pedicle = _capsule((side, u, 0.7 * w), (15.5, -5, 0.15 * h), (16.5, 13, 0.12 * h), 4.6 * scale)
        pillar = _capsule((side, u, w), (18.5, 13, 0.45 * h), (15, 21, -0.75 * h), 4.6 * scale)
        lamina = _capsule((side, u, 0.5 * w), (15, 18, -0.08 * h), (1, self.arch + 1, -0.15 * h), 3.3 * scale)
        transverse = _capsule((side, u, w), (18, 11, 0.12 * h), (36 * scale, 16, 0.1 * h), 4 * scale)
        v, s = u - self.arch - length / 2, w + 0.32 * h + slope * (u - self.arch)
        flare = half_height * (1 + 0.25 * v / max(length, 1.0))
        spinous = _rounded(_rounded(np.abs(v) - length / 2, np.abs(s) - flare, 4.0), side - 3.4, 2.0)
        return np.minimum.reduce([pedicle, pillar, lamina, transverse, spinous])

    def edge(self, plate: _Frame, inwards: int):
        """Anterior end, centre and posterior end (y, z) of an endplate on the mid-sagittal surface."""
        half = self.depth / 2
        return [plate.to_plane(t, inwards * float(self._dish(0.0, t))) for t in (-half, 0.0, half)]

    def _dish(self, x, t):
        bowl = 1 - np.square(t * (2 / self.depth)) - np.square(x * (2 / self.width))
        return self.concavity * np.maximum(bowl, 0)


@dataclass(frozen=True)
class _Disc:
    number: int
    below: _Body
    above: _Body
    frame: _Frame
    height: float
    depth: float
    width: float
    grade: int

    def distance(self, x, y, z):
        """Signed distance to the disc's surface, negative inside; its endplates are those of its neighbours."""
        u, _ = self.frame.to_local(y, z)
        wall = _superellipse(u, x, self.depth / 2, self.width / 2)
        plates = np.maximum(-self.below.above_upper(x, y, z), -self.above.below_lower(x, y, z))
        return _rounded(wall, plates, 1.5)

    def nucleus(self, x, y, z):
        """Weight 0..1 of the nucleus pulposus; a cleft and then a collapse mark the higher grades."""
        u, w = self.frame.to_local(y, z)
        radius = (
            np.square((u - 0.03 * self.depth) / (0.40 * self.depth)) ** 2
            + np.square(x / (0.40 * self.width)) ** 2
            + np.square(w / (0.6 * self.height))
        )
        weight = np.clip(1.5 * (1.2 - radius), 0, 1)
        if self.grade >= 2:
            weight = weight * (1 - 0.4 * np.exp(-np.square(w / (0.12 * self.height))))
        return weight


@dataclass(frozen=True)
class _Curve:
    """A smooth function of z through control points, tabulated once."""

    first: float
    step: float
    values: np.ndarray

    @classmethod
    def through(cls, z, values, smoothing_mm: float, step: float = 0.5) -> _Curve:
        order = np.argsort(z)
        z, values = np.asarray(z)[order], np.asarray(values)[order]
        grid = np.arange(z[0] - 120, z[-1] + 60, step)
        table = ndimage.gaussian_filter1d(np.interp(grid, z, values), smoothing_mm / step, mode="nearest")
        return cls(float(grid[0]), step, table.astype(np.float32))

    def __call__(self, z):
        position = np.clip((np.asarray(z, np.float32) - self.first) / self.step, 0, len(self.values) - 1.001)
        index = position.astype(np.int32)
        left = self.values[index]
        return left + (position - index) * (self.values[index + 1] - left)


@dataclass(frozen=True)
class _Canal:
    """A tube about a centre line y = centre(z); its end lies in the sacrum."""

    centre: _Curve
    half_depth: _Curve
    cosine: _Curve
    fat: _Curve  # thickness behind the sac: pads between the laminae
    half_width: float
    end: float

    def local(self, y, z):
        """Posterior offset from the centre line, perpendicular to it, and the half depth there (mm)."""
        cap = np.sqrt(np.clip((z - self.end) / 12, 1e-4, 1))
        return (y - self.centre(z)) * self.cosine(z), self.half_depth(z) * cap

    def distance(self, x, y, z):
        """Signed distance to the wall, negative inside, exact on the mid-sagittal surface."""
        offset, half = self.local(y, z)
        radius = np.sqrt(np.square(offset / half) + np.square(x / self.half_width))
        return np.maximum((radius - 1) * half, self.end - z)


@dataclass(frozen=True)
class _Patient:
    seed: tuple[int, int]
    sex: str
    vertebrae: tuple[_Body, ...]
    discs: tuple[_Disc, ...]
    sacrum: tuple[_Body, ...]
    canal: _Canal
    conus: float
    midline: _Curve
    front: _Curve  # anterior wall of the column
    fascia: _Curve  # tips of the spinous processes
    skin: _Curve
    belly: float  # from the column to the abdominal wall
    infiltration: float  # share of fat in the back muscles
    marrow: float
    loops: tuple[tuple[float, ...], ...]

    def to_lps(self, y: float, z: float) -> list[float]:
        return [round(float(value), 4) for value in (self.midline(z), y, z)]


def _draw_patient(seed: int, name: str, settings: dict) -> _Patient:
    ranges = settings["anatomy"]
    rng = np.random.default_rng([seed, int(name), 1])

    def draw(key: str) -> float:
        return float(rng.uniform(*ranges[key]))

    sex = "F" if rng.random() < 0.5 else "M"
    size = draw("stature") * (0.97 if sex == "F" else 1.03)
    lordosis = math.radians(draw("lordosis_deg"))
    canal_depth = draw("canal_ap_mm")
    degeneration = draw("degeneration")
    sacral_tilt = 0.72 * lordosis + math.radians(float(rng.uniform(0, 6)))
    start = _Frame(float(rng.uniform(10, 40)), float(rng.uniform(-110, -80)), sacral_tilt)

    sacrum = _draw_sacrum(start, size)
    vertebrae, discs = [], []
    top, below = start, sacrum[0]
    for number, (level, row) in enumerate(_LEVELS.items(), start=1):
        height, depth, width, gap, body_wedge, disc_wedge = row
        height, depth, width, gap = (
            size * value * float(rng.normal(1, ranges["variation"])) for value in (height, depth, width, gap)
        )
        # The lower lumbar discs wear first.
        wear = degeneration * (1.6 if number <= 2 else 1.0 if number <= 4 else 0.6)
        grade = int(np.clip(1 + round(5 * wear * float(rng.uniform(0.3, 1.3))), 1, 5))
        gap *= 1 - 0.08 * (grade - 1)
        wedge = lordosis * (disc_wedge + float(rng.normal(0, 0.01)))
        disc_frame, base = top.climb(gap, wedge)
        frame, top = base.climb(height, lordosis * body_wedge)
        lumbar = number <= _LUMBAR_LEVELS
        slope = 0.12 if lumbar else min(0.2 + 0.15 * (number - _LUMBAR_LEVELS), 0.8)
        length = (19 if number == 1 else 25 if lumbar else 22) * size * float(rng.uniform(0.92, 1.1))
        body = _Body(
            number, level, base, top, frame, height, depth, width,
            taper=0.0,
            waist=float(rng.uniform(0.8, 1.8)),
            concavity=float(rng.uniform(0.7, 1.5)),
            rounding=float(rng.uniform(2.0, 3.2)),
            arch=canal_depth + 5.0,
            process=(length, (6.5 if number == 1 else 9.0 if lumbar else 6.0) * size, slope),
        )  # fmt: skip
        bulge = 0.4 * (grade - 1) + float(rng.uniform(-0.4, 0.4))
        disc_depth = min(below.depth, depth) + bulge
        discs.append(_Disc(number, below, body, disc_frame, gap, disc_depth, width - 1, grade))
        vertebrae.append(body)
        below = body

    end = sacrum[1].frame.to_plane(0, -0.4 * sacrum[1].height)[1]
    canal = _draw_canal(vertebrae, discs, sacrum, canal_depth, draw("canal_width_mm") / 2, end, rng)
    posterior = [body.frame.to_plane(body.depth / 2 + body.arch + body.process[0], -0.5 * body.height - body.process[2]
                 * body.process[0]) for body in vertebrae]  # fmt: skip
    posterior += [body.frame.to_plane(body.depth / 2 + 22 - 3 * body.number, 0) for body in sacrum]
    anterior = [body.frame.to_plane(-body.depth / 2, 0) for body in (*sacrum, *vertebrae)]
    fat = draw("subcutaneous_fat_mm")
    heights = [z for _, z in posterior]
    hollow = vertebrae[2].frame.z
    thickness = [fat * (0.55 + 0.6 * math.exp(-(((z - hollow + 90) / 70) ** 2))) for z in heights]
    middle, phase = vertebrae[3].frame.z, float(rng.uniform(-40, 40))
    bend = float(rng.uniform(-1, 1)) * ranges["scoliosis_mm"]
    span = np.linspace(-220, 420, 65)
    loops = tuple(
        tuple(float(value) for value in (*rng.uniform((-35, 20, -110), (35, 95, 190)), *rng.uniform(7, 20, 3), kind))
        for kind in rng.integers(0, 3, 26)
    )
    return _Patient(
        seed=(seed, int(name)),
        sex=sex,
        vertebrae=tuple(vertebrae),
        discs=tuple(discs),
        sacrum=tuple(sacrum),
        canal=canal,
        conus=vertebrae[3].frame.z + float(rng.uniform(5, 35)),
        midline=_Curve.through(span + middle, bend * np.cos((span - phase) / 55) + float(rng.uniform(-8, 8)), 2.0),
        front=_Curve.through([z for _, z in anterior], [y for y, _ in anterior], 6.0),
        fascia=_Curve.through(heights, [y + 3 for y, _ in posterior], 14.0),
        skin=_Curve.through(heights, [y + 3 + t for (y, _), t in zip(posterior, thickness, strict=True)], 25.0),
        belly=float(rng.uniform(80, 120)),
        infiltration=float(np.clip(degeneration * rng.uniform(0.5, 1.5), 0, 0.6)),
        marrow=float(rng.uniform(0.9, 1.1)),
        loops=loops,
    )


def _draw_sacrum(top: _Frame, size: float) -> list[_Body]:
    bodies = []
    for number, (height, above, below, tilt) in enumerate(_SACRUM, start=1):
        height, above, below = height * size, above * size, below * size
        axis = _Frame(top.y, top.z, top.tilt + math.radians(tilt) if bodies else top.tilt)
        middle = _Frame(*axis.to_plane(0, -height / 2), axis.tilt)
        bottom = _Frame(*axis.to_plane(0, -height), axis.tilt)
        bodies.append(
            _Body(
                number, f"S{number}", bottom, axis, middle, height, (above + below) / 2, (62 - 9 * number) * size,
                taper=(above - below) / 2 / height, waist=0.8, concavity=0.6, rounding=2.0,
            )
        )  # fmt: skip
        # A remnant of the disc, two millimetres high, lies between the fused segments.
        top = _Frame(*bottom.to_plane(0, -2.0), bodies[0].frame.tilt)
    return bodies


def _draw_canal(vertebrae, discs, sacrum, depth, half_width, end, rng) -> _Canal:
    """The canal keeps clear of bodies and discs; worn discs narrow it."""
    points = []
    for body in vertebrae:
        points.append((body.frame, body.depth / 2 - body.waist + 2.5, depth * float(rng.uniform(0.95, 1.05))))
    for disc in discs:
        narrowing = 0.5 * (disc.grade - 1) * float(rng.uniform(0.3, 1.0))
        points.append((disc.frame, disc.depth / 2 + 1.0, depth - 0.8 - narrowing))
    for body, share in zip(sacrum, (0.85, 0.6, 0.4, 0.3), strict=True):
        points.append((body.frame, body.depth / 2 + 3.0, depth * share))
    centres = [frame.to_plane(wall + ap / 2, 0.0) for frame, wall, ap in points]
    heights = [z for _, z in centres]
    centre = _Curve.through(heights, [y for y, _ in centres], 4.0)
    slope = np.gradient(centre.values.astype(float), centre.step)
    cosine = replace(centre, values=(1 / np.hypot(1, slope)).astype(np.float32))
    half = _Curve.through(heights, [ap / 2 for _, _, ap in points], 4.0)
    fat = [0.5] * len(vertebrae) + [4.5] * len(discs) + [3.0] * len(sacrum)
    return _Canal(centre, half, cosine, _Curve.through(heights, fat, 3.0), half_width, end)


def _superellipse(u, x, half_depth, half_width):
    power = 2.6
    u, x = np.abs(u) / half_depth, np.abs(x) / half_width
    return ((u**power + x**power) ** (1 / power) - 1) * half_depth


def _rounded(first, second, radius: float):
    """Signed distance to the intersection of two regions, its edge rounded."""
    first, second = first + radius, second + radius
    outside = np.sqrt(np.square(np.maximum(first, 0)) + np.square(np.maximum(second, 0)))
    return np.minimum(np.maximum(first, second), 0) + outside - radius


def _capsule(point, start, end, radius: float):
    """Signed distance to a straight rod with round ends; `point` is a tuple of three arrays."""
    axis = [b - a for a, b in zip(start, end, strict=True)]
    offset = [p - a for p, a in zip(point, start, strict=True)]
    along = sum(o * a for o, a in zip(offset, axis, strict=True)) / sum(a * a for a in axis)
    along = np.clip(along, 0, 1)
    return np.sqrt(sum(np.square(o - along * a) for o, a in zip(offset, axis, strict=True))) - radius


# --- Measuring the surfaces -----------------------------------------------------------------------------------------


def _measure(patient: _Patient, frame: _Frame, depth: float, distance, prefix: str) -> dict:
    chords = {
        f"{prefix}height_{name}": _chord(patient, frame, (share * depth, 0.0), (0.0, 1.0), distance)
        for name, share in (("anterior", -0.35), ("middle", 0.0), ("posterior", 0.35))
    }
    chords[f"{prefix}depth"] = _chord(patient, frame, (0.0, 0.0), (1.0, 0.0), distance)
    behind = np.linspace(depth / 2, depth / 2 + 30, 301)
    inside = patient.canal.distance(0.0, *frame.to_plane(behind, 0.0)) < 0
    middle = float(behind[inside].mean())
    chords["canal_ap"] = _chord(patient, frame, (middle, 0.0), (1.0, 0.0), patient.canal.distance)
    return chords


def _chord(patient: _Patient, frame: _Frame, through, direction, distance) -> dict:
    """The chord of a region through an inner point (u, w): its two ends where the signed distance changes sign."""

    def point(step):
        return frame.to_plane(through[0] + step * direction[0], through[1] + step * direction[1])

    ends = []
    for sign in (-1, 1):
        # Step out to the first point outside, then halve the last step.
        steps = sign * np.arange(0, 60, 0.25)
        first = int(np.flatnonzero(distance(0.0, *point(steps)) > 0)[0])
        inner, outer = float(steps[first - 1]), float(steps[first])
        for _ in range(16):
            half = (inner + outer) / 2
            inner, outer = (inner, half) if distance(0.0, *point(half)) > 0 else (half, outer)
        ends.append(patient.to_lps(*point(inner)))
    return {"mm": round(math.dist(*ends), 3), "from": ends[0], "to": ends[1]}


# --- Planning a series ----------------------------------------------------------------------------------------------


def _kind(sequence: str) -> str:
    return "isotropic" if sequence == "t2_SPACE" else "thick"


def _plan_series(index: int, sequence: str, subset: str, settings: dict) -> SeriesPlan:
    name = str(index + 1)
    patient = _draw_patient(settings["seed"], name, settings)
    rng = np.random.default_rng([settings["seed"], index + 1, 10 + SEQUENCES.index(sequence)])
    acquisition, view = settings["acquisition"][_kind(sequence)], settings["field_of_view"]

    def draw(bounds) -> float:
        return float(rng.uniform(*bounds))

    oblique = settings["oblique_deg"]
    limits = np.array([oblique["in_plane"], oblique["through_plane"], oblique["through_plane"]])
    rotation = tuple(round(float(angle), 2) for angle in rng.uniform(-limits, limits))
    slice_axis, row, column = SAGITTAL_AXES @ _rotation(np.deg2rad(rotation)).T

    # Along the image's own upward axis: the corners of each body's endplates, and the bottom of their dishes.
    heights = [
        np.array([patient.to_lps(*point) for point in (*body.edge(body.lower, 1), *body.edge(body.upper, -1))]) @ -row
        for body in patient.vertebrae
    ]
    counts = [int(count) for count in view["vertebrae"]]
    weights = np.array([float(weight) for weight in view["vertebrae"].values()])
    count = int(rng.choice(counts, p=weights / weights.sum()))
    # The upper edge cuts the topmost body across its middle or passes just above it, where the next leaves room.
    above = heights[count - 1].max() + 1.0
    partial = rng.random() < view["partial_top_share"] or heights[count].min() <= above
    edge = heights[count - 1].min() + draw((0.35, 0.65)) * np.ptp(heights[count - 1]) if partial else above
    sacral = np.array(patient.to_lps(patient.sacrum[0].upper.y, patient.sacrum[0].upper.z))
    floor = sacral @ -row - draw(view["below_sacral_endplate_mm"])

    seen = patient.vertebrae[:count]
    walls = [patient.to_lps(*body.frame.to_plane(-body.depth / 2, 0)) for body in seen]
    tips = [
        patient.to_lps(*body.frame.to_plane(body.depth / 2 + body.arch + body.process[0], -0.4 * body.height))
        for body in seen
    ]
    front = (np.array(walls) @ column).min() - draw(view["in_front_mm"])
    back = (np.array(tips) @ column).max() + draw(view["behind_mm"])

    rows = int(rng.integers(settings["matrix"]["rows"][0], settings["matrix"]["rows"][1] + 1))
    row_spacing = round(float(edge - floor) / rows, 4)
    # Reached is what holds a voxel's centre, half a row below the edge.
    top = edge - row_spacing / 2
    column_spacing = round(row_spacing * (1 + draw((-1, 1)) * settings["matrix"]["anisotropy"]), 4)
    slices = int(rng.integers(acquisition["slices"][0], acquisition["slices"][1] + 1))
    slice_spacing = round(draw(acquisition["spacing_mm"]), 2)
    middle = seen[len(seen) // 2]
    pivot = np.array(patient.to_lps(*middle.frame.to_plane(middle.depth / 2, 0)))
    centre = (pivot @ slice_axis) * slice_axis - (edge + floor) / 2 * row + (front + back) / 2 * column
    return SeriesPlan(
        name=f"{name}_{sequence}",
        patient=name,
        sequence=sequence,
        subset=subset,
        sex=patient.sex,
        seed=int(settings["seed"]),
        size=(slices, rows, round(float(back - front) / column_spacing)),
        spacing_mm=(slice_spacing, row_spacing, column_spacing),
        slice_thickness_mm=round(slice_spacing * draw(acquisition["thickness_share"]), 2),
        centre_mm=tuple(round(float(value), 4) for value in centre),
        rotation_deg=rotation,
        storage_order=str(rng.choice(STORAGE_ORDERS)),
        dtype=str(rng.choice(["int16", "uint16"])),
        intensity=round(draw(settings["intensity"]), 1),
        vertebrae=sum(int(height.min() < top) for height in heights),
        whole_vertebrae=sum(int(height.max() < edge) for height in heights),
        # A disc begins where the body below it ends; the sacrum is always in view.
        discs=1 + sum(int(height[3:].min() < top) for height in heights[: len(patient.discs) - 1]),
    )


def _rotation(angles) -> np.ndarray:
    """Rotation about x, then y, then z (radians)."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def _stored(kind: type, array: np.ndarray, plan: SeriesPlan):
    """The sagittal array in the plan's storage order, with the geometry that belongs to it."""
    axes, spacing, first = plan.axes.copy(), np.array(plan.spacing_mm), plan.first_mm
    order = []
    for letter in plan.storage_order:
        axis = next(axis for axis, ends in enumerate(("LR", "SI", "PA")) if letter in ends)
        if letter != _SAGITTAL_ORDER[axis]:
            array = np.flip(array, axis)
            first = first + (plan.size[axis] - 1) * spacing[axis] * axes[axis]
            axes[axis] *= -1
        order.append(axis)
    return kind(
        array=np.ascontiguousarray(array.transpose(order[::-1])),
        spacing_mm=tuple(float(value) for value in spacing[order]),
        origin_mm=tuple(float(value) for value in first),
        direction=axes[order].T,
    )


# --- Painting -------------------------------------------------------------------------------------------------------

# Correlation lengths (mm) along x, y and z of the textures.
_TEXTURES = {
    "fine": (2.5, 2.5, 2.5),
    "patches": (7.0, 6.0, 7.0),
    "coarse": (16.0, 13.0, 13.0),
    "strands": (3.0, 3.5, 26.0),
}


class _Canvas:
    """Values and labels on one plane per slice: the sagittal grid, shifted along the slice axis."""

    def __init__(self, plan: SeriesPlan, patient: _Patient, shift_mm: float = 0.0):
        self.size, self.axes = np.array(plan.size), plan.axes
        self.spacing = np.array(plan.spacing_mm)
        self.first = plan.first_mm + shift_mm * self.axes[0]
        steps = [np.arange(count) * spacing for count, spacing in zip(plan.size, plan.spacing_mm, strict=True)]
        x, y, z = (
            np.add.outer(
                np.add.outer(self.first[i] + steps[0] * self.axes[0, i], steps[1] * self.axes[1, i]),
                steps[2] * self.axes[2, i],
            ).astype(np.float32)
            for i in range(3)
        )
        self.x, self.y, self.z = x - patient.midline(z), y, z
        self.edge = max(plan.spacing_mm[1:])
        self.whole_vertebrae = plan.whole_vertebrae
        self.values = np.zeros(plan.size, np.float32)
        self.labels = np.zeros(plan.size, np.uint8)

    def box(self, x, y, z) -> tuple[slice, slice, slice] | None:
        """The part of the grid that covers these (lower, upper) bounds in LPS mm."""
        corners = np.array(list(product(x, y, z))) - self.first
        index = corners @ self.axes.T / self.spacing
        low = np.clip(np.floor(index.min(axis=0)), 0, self.size).astype(int)
        high = np.clip(np.ceil(index.max(axis=0)) + 1, 0, self.size).astype(int)
        if (low >= high).any():
            return None
        return tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))

    def at(self, box):
        return self.x[box], self.y[box], self.z[box]

    def paint(self, box, distance, value, label: int | None = None, weight=1.0) -> None:
        # A linear ramp one pixel wide: the share of the pixel that a straight edge covers.
        cover = np.clip(0.5 - distance / self.edge, 0, 1)
        target = self.values[box]
        target += cover * weight * (value - target)
        if label is not None:
            self.labels[box][distance < 0] = label


def _paint(canvas: _Canvas, patient: _Patient, signal: dict, textures: dict) -> None:
    """Everything, from the back of the picture to its front."""
    _paint_soft_tissue(canvas, patient, signal, textures)
    _paint_bones_and_discs(canvas, patient, signal, textures)
    _paint_canal(canvas, patient, signal, textures)


def _paint_soft_tissue(canvas, patient, signal, textures) -> None:
    x, y, z = canvas.x, canvas.y, canvas.z
    everywhere = (slice(None),) * 3
    coarse, strands = textures["coarse"], textures["strands"]
    side = np.abs(x)
    front, fascia, skin = patient.front(z), patient.fascia(z), patient.skin(z) - np.square(x) / 300
    canal = patient.canal.centre(z)
    canvas.values[:] = signal["fat"] * (1 + 0.08 * coarse + 0.05 * textures["fine"])

    def paint(distance, value, weight=1.0):
        canvas.paint(everywhere, distance, value, weight=weight)

    # Bowel and mesenteric fat in patches.
    share = np.clip(0.35 + 1.2 * coarse + 0.9 * textures["patches"], 0, 1)
    viscera = signal["viscera"] + share * (signal["fat"] - signal["viscera"])
    paint(y - front + 7 + 7 * coarse, viscera)
    strength = np.clip(patient.infiltration + 0.35 * strands + 0.1 * coarse, 0, 0.9)
    muscle = signal["muscle"] * (1 + 0.12 * strands)
    paint(np.maximum(y - fascia + 1, canal + 8 - y), muscle + strength * (signal["fat"] - muscle))
    psoas = np.sqrt(np.square((side - 40) / 17) + np.square((y - front - 22) / 20)) - 1
    paint(15 * psoas, muscle)
    # Between the spinous processes: ligament and fat in strands.
    between = signal["ligament"] + (0.35 + 0.3 * strands) * (signal["fat"] - signal["ligament"])
    paint(np.maximum(side - 3.5, np.maximum(y - fascia, canal - y)), between)
    paint(np.maximum(np.abs(y - fascia) - 0.9, side - 25), signal["ligament"])
    _paint_vessels(canvas, patient, signal, front)
    # The anterior longitudinal ligament binds the column.
    paint(np.maximum(np.abs(y - front + 1) - 1.2, side - 12), signal["cortex"])
    for dx, dy, dz, *radii, kind in patient.loops:
        middle = (float(patient.midline(dz)) + dx, float(patient.front(dz)) - dy - max(radii), dz)
        box = canvas.box(*((m - r - 2, m + r + 2) for m, r in zip(middle, radii, strict=True)))
        if box is None:
            continue
        scaled = sum(np.square((p - m) / r) for p, m, r in zip(canvas.at(box), (dx, *middle[1:]), radii, strict=True))
        loop = (np.sqrt(scaled) - 1) * min(radii)
        canvas.paint(box, loop, signal["muscle"])
        canvas.paint(box, loop + 2, signal[("fluid", "viscera", "air")[int(kind)]] * (0.8 + 0.3 * coarse[box]))
    paint(y - front + patient.belly, signal["muscle"])
    paint(y - front + patient.belly + 9, signal["fat"])
    paint(y - front + patient.belly + 34, signal["air"])
    paint(skin - 2.0 - y, signal["skin"])
    paint(skin - y, signal["air"])


def _paint_vessels(canvas, patient, signal, front) -> None:
    """Aorta (left) and vena cava (right) in front of the column, dark by flow, down to the fourth lumbar vertebra."""
    bifurcation = patient.vertebrae[1].frame.z
    spread = np.clip((bifurcation - canvas.z) / 60, 0, 1)
    for offset, radius in ((6.0, 8.0), (-16.0, 9.0)):
        centre = offset + math.copysign(28, offset) * spread
        depth = canvas.y - (front - radius - 3.5 + 14 * spread)
        tube = np.hypot(canvas.x - centre, depth) - radius * (1 - 0.4 * spread)
        everywhere = (slice(None),) * 3
        canvas.paint(everywhere, tube, signal["ligament"])
        canvas.paint(everywhere, tube + 1.2, signal["blood"])


def _paint_bones_and_discs(canvas, patient, signal, textures) -> None:
    canal = patient.canal
    top, crest_top = patient.vertebrae[-1].upper.z, patient.sacrum[0].frame.z + 4
    box = canvas.box((-60, 60), (-200, 200), (canal.end - 40, top))
    if box is not None:
        # Fat lies behind the dura, and the sacral crest behind the fat.
        x, y, z = canvas.at(box)
        offset, half = canal.local(y, z)
        pad = canal.fat(z) / 2
        fat = np.sqrt(np.square((offset - pad) / (half + pad)) + np.square(x / (canal.half_width + 2.5))) - 1
        canvas.paint(box, fat * half, signal["fat"])
        behind = np.abs(offset - half - 7.5) - np.clip(0.12 * (crest_top - z), 1.0, 5.0)
        crest = _rounded(_rounded(behind, z - crest_top, 3.0), np.abs(x) - 12, 3.0)
        canvas.paint(box, crest, signal["cortex"])
        canvas.paint(box, crest + 1.2, signal["marrow"])
    for body in patient.sacrum:
        _paint_remnant(canvas, patient, body, signal)
    for body in patient.sacrum:
        _paint_bone(canvas, patient, body, signal, textures, None)
    for body in patient.vertebrae:
        _paint_bone(canvas, patient, body, signal, textures, body.number)
    for disc in patient.discs:
        _paint_disc(canvas, patient, disc, signal, textures)
        _paint_roots(canvas, patient, disc, signal)


def _paint_bone(canvas, patient, body, signal, textures, number) -> None:
    arch = body.arch + body.process[0] if number else 0.0
    drop = body.process[1] + body.process[2] * arch
    box = _box(canvas, patient, body.frame, (-body.depth / 2 - 4, body.depth / 2 + arch + 6),
               (-0.9 * body.height - drop, 0.75 * body.height))  # fmt: skip
    if box is None:
        return
    x, y, z = canvas.at(box)
    distance = body.distance(x, y, z)
    marrow = signal["marrow"] * patient.marrow
    marrow = marrow * (1 + 0.2 * textures["fine"][box] + 0.15 * textures["coarse"][box])
    if number:
        arch = body.arch_distance(x, y, z)
        whole = np.minimum(distance, arch)
        label = number if number <= canvas.whole_vertebrae else PARTIAL_OFFSET + number
        canvas.paint(box, whole, signal["cortex"], label)
        canvas.paint(box, arch + 1.1, 1.1 * marrow)
    else:
        canvas.paint(box, distance, signal["cortex"])
    canvas.paint(box, distance + 1.1, marrow)
    # The basivertebral vein enters at the middle of the posterior wall.
    u, w = body.frame.to_local(y, z)
    vein = np.sqrt(np.square((u - body.depth / 2 + 5) / 6) + np.square(w / 1.9) + np.square(x / 7)) - 1
    if number:
        canvas.paint(box, 1.9 * vein, signal["vein"], weight=0.8)


def _paint_remnant(canvas, patient, body, signal) -> None:
    """The rest of a disc below a sacral segment."""
    half = body.depth / 2 - body.taper * body.height / 2
    box = _box(canvas, patient, body.lower, (-half - 3, half + 3), (-6, 4))
    if box is None:
        return
    x, y, z = canvas.at(box)
    u, w = body.lower.to_local(y, z)
    slab = _rounded(_superellipse(u, x, half, body.width / 2), np.abs(w + 1.5) - 2.2, 1.0)
    canvas.paint(box, slab, signal["annulus"])


def _paint_disc(canvas, patient, disc, signal, textures) -> None:
    box = _box(canvas, patient, disc.frame, (-disc.depth / 2 - 3, disc.depth / 2 + 3),
               (-disc.height - 9, disc.height + 9))  # fmt: skip
    if box is None:
        return
    x, y, z = canvas.at(box)
    # A worn nucleus has lost its water and with it the signal.
    bright = signal["annulus"] + (1 - (disc.grade - 1) / 4) ** 1.3 * (signal["nucleus"] - signal["annulus"])
    value = signal["annulus"] + disc.nucleus(x, y, z) * (bright - signal["annulus"])
    value = value * (1 + 0.1 * textures["fine"][box])
    distance = disc.distance(x, y, z)
    if disc.grade >= 4:
        # Fatty marrow along the endplates of a worn disc (Modic type 2).
        bone = np.minimum(disc.below.distance(x, y, z), disc.above.distance(x, y, z))
        canvas.paint(box, bone + 1.1, signal["fat"], weight=0.45 * np.exp(-np.square((distance - 3) / 3)))
    canvas.paint(box, distance, value, DISC_OFFSET + disc.number)


def _paint_roots(canvas, patient, disc, signal) -> None:
    """The two nerve roots that leave above a disc, with a vessel, in the fat of the foramina."""
    wall, height = disc.depth / 2, disc.above.height
    box = _box(canvas, patient, disc.frame, (wall, wall + 16), (0, 0.8 * height))
    if box is None:
        return
    x, y, z = canvas.at(box)
    u, w = disc.frame.to_local(y, z)
    u, w = u - wall - 6, w - 0.35 * height
    free = canvas.labels[box] == 0
    side = np.maximum(np.abs(np.abs(x) - 19) - 6, 0)
    canvas.paint(box, np.sqrt(np.square(u / 1.1) + np.square(w) + np.square(side)) - 3, signal["cord"], weight=free)
    vessel = np.sqrt(np.square(u + 2) + np.square(w - 5.5) + np.square(side)) - 1.2
    canvas.paint(box, vessel, signal["blood"], weight=free)


def _paint_canal(canvas, patient, signal, textures) -> None:
    canal = patient.canal
    box = canvas.box((-45, 45), (-200, 200), (canal.end - 4, patient.vertebrae[-1].upper.z))
    if box is None:
        return
    x, y, z = canvas.at(box)
    wall = canal.distance(x, y, z)
    offset, half = canal.local(y, z)
    share = offset / half
    canvas.paint(box, wall - 0.9, signal["cortex"])
    # The roots of the cauda equina sink to the back of the sac of a patient who lies supine.
    strands = np.exp(-np.square((share - 0.45) / 0.4)) * np.clip(0.45 + 0.5 * textures["strands"][box], 0, 0.9)
    strands = strands * np.clip((patient.conus + 15 - z) / 15, 0, 1) * np.clip((z - canal.end) / 60, 0, 1)
    value = signal["csf"] + 0.75 * strands * (signal["cord"] - signal["csf"])
    canvas.paint(box, wall, value, CANAL_ID)
    radius = 4.6 * np.sqrt(np.clip((z - patient.conus) / 35, 1e-4, 1))
    cord = np.sqrt(np.square(offset - 0.8) + np.square(x / 1.25)) - radius
    canvas.paint(box, np.maximum(cord, wall), signal["cord"] * np.ones_like(cord))


def _box(canvas, patient, frame: _Frame, u, w):
    """The part of the grid that covers the given range of a frame, over the width of a vertebra."""
    corners = np.array([frame.to_plane(a, b) for a, b in product(u, w)])
    middle = float(patient.midline(frame.z))
    (y0, z0), (y1, z1) = corners.min(axis=0), corners.max(axis=0)
    return canvas.box((middle - 48, middle + 48), (y0, y1), (z0, z1))


def _texture(seed, canvas: _Canvas, scales_mm) -> np.ndarray:
    """Smooth noise about 0, fixed in the patient: float32 on the sagittal grid."""
    rng = np.random.default_rng([*seed, *(int(10 * scale) for scale in scales_mm)])
    lattice = rng.uniform(-1, 1, (32, 32, 32)).astype(np.float32)
    points = [p / scale for p, scale in zip((canvas.x, canvas.y, canvas.z), scales_mm, strict=True)]
    return ndimage.map_coordinates(lattice, points, order=1, mode="grid-wrap", output=np.float32)


def _bias_field(plan, patient, canvas, settings: dict, rng) -> np.ndarray:
    """Sensitivity of a coil behind the back, times a smooth field of the given amplitude."""
    depth = np.maximum(float(patient.skin.values.mean()) - canvas.y, 0)
    field = np.exp(-depth / float(rng.uniform(*settings["coil_depth_mm"])))
    s, r, c = (
        np.linspace(-1, 1, count, dtype=np.float32).reshape([-1 if axis == other else 1 for other in range(3)])
        for axis, count in enumerate(plan.size)
    )
    weights = rng.uniform(-1, 1, 6) * settings["amplitude"] / 2
    terms = (r, c, r * c, r * r, c * c, s)
    smooth = sum(float(weight) * term for weight, term in zip(weights, terms, strict=True))
    return field * np.exp(smooth) * (1 - float(settings["edge_drop"]) * r**4)
