"""The synthetic scans: their geometry, labels and known anatomy agree with each other, voxel by voxel."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk

from lumbarflow import phantom
from lumbarflow.imaging import SAGITTAL_AXES, LabelMap, Volume, read_volume, to_sagittal, write_volume

SETTINGS = {
    "seed": 7,
    "patients": 6,
    "validation_share": 0.34,
    "sequences": {"t1": 1.0, "t2": 1.0, "t2_SPACE": 0.5},
    "anatomy": {
        "stature": [0.94, 1.06],
        "variation": 0.03,
        "lordosis_deg": [38, 58],
        "scoliosis_mm": 3.0,
        "canal_ap_mm": [14.0, 17.5],
        "canal_width_mm": [21.0, 25.0],
        "degeneration": [0.05, 0.6],
        "subcutaneous_fat_mm": [12, 34],
    },
    "field_of_view": {
        "vertebrae": {6: 1, 7: 1, 9: 1},
        "partial_top_share": 0.5,
        "below_sacral_endplate_mm": [30, 42],
        "in_front_mm": [20, 40],
        "behind_mm": [10, 30],
    },
    "matrix": {"rows": [110, 150], "anisotropy": 0.15},
    "acquisition": {
        "thick": {"slices": [11, 13], "spacing_mm": [3.3, 4.8], "thickness_share": [0.85, 1.0], "samples": 3},
        "isotropic": {"slices": [20, 24], "spacing_mm": [0.9, 1.2], "thickness_share": [1.0, 1.0], "samples": 1},
    },
    "oblique_deg": {"in_plane": 15, "through_plane": 4},
    "intensity": [300, 2500],
    "noise": [0.008, 0.03],
    "bias": {"coil_depth_mm": [110, 240], "amplitude": 0.3, "edge_drop": 0.3},
}


def settings(**groups) -> dict:
    """SETTINGS with some values of some groups replaced."""
    changed = copy.deepcopy(SETTINGS)
    for name, value in groups.items():
        if isinstance(value, dict) and name != "sequences":
            changed[name] |= value
        else:
            changed[name] = value
    return changed


@pytest.fixture(scope="module")
def plans():
    return phantom.plan_cohort(SETTINGS)


@pytest.fixture(scope="module")
def cohort(plans):
    """plan, image, mask and known anatomy of every series."""
    return [(plan, *phantom.render(plan, SETTINGS), phantom.anatomy(plan, SETTINGS)) for plan in plans]


def label_at(mask: LabelMap, point_mm) -> int | None:
    """The label at an LPS position, found by SimpleITK from the header's geometry; None outside."""
    image = sitk.GetImageFromArray(mask.array)
    image.SetSpacing(mask.spacing_mm)
    image.SetOrigin(mask.origin_mm)
    image.SetDirection(mask.direction.ravel())
    index = image.TransformPhysicalPointToIndex([float(value) for value in point_mm])
    inside = all(0 <= i < n for i, n in zip(index, image.GetSize(), strict=True))
    return int(image[index]) if inside else None


def centroid(mask: LabelMap, label: int) -> np.ndarray:
    """LPS position of a label's centre of mass."""
    zyx = np.argwhere(mask.array == label).mean(axis=0)
    return np.asarray(mask.origin_mm) + mask.direction @ (zyx[::-1] * mask.spacing_mm)


def vertebra_labels(mask: LabelMap) -> list[int]:
    ids = np.unique(mask.array).tolist()
    return sorted((i for i in ids if 0 < i < 100 or 100 < i < 200), key=lambda i: i % 100)


# --- Determinism and the plan ---------------------------------------------------------------------------------------


def test_the_same_settings_give_the_same_bytes():
    first, second = (phantom.plan_cohort(copy.deepcopy(SETTINGS)) for _ in range(2))
    assert first == second
    renders = [phantom.render(plan, SETTINGS) for plan in (first[0], second[0])]
    for one, other in zip(*renders, strict=True):
        assert one.array.tobytes() == other.array.tobytes()
        assert one.array.dtype == other.array.dtype
        assert (one.spacing_mm, one.origin_mm) == (other.spacing_mm, other.origin_mm)
        assert np.array_equal(one.direction, other.direction)


def test_another_seed_or_patient_is_another_spine(plans):
    heights = set()
    for plan in [*plans, *phantom.plan_cohort(settings(seed=8))]:
        heights.add(phantom.anatomy(plan, SETTINGS)["vertebrae"][0]["body_height_middle"]["mm"])
    assert len(heights) == 12  # 6 patients for each of 2 seeds


def test_more_patients_leave_the_first_ones_as_they_are():
    # t1 is scanned of everyone, so only the choice of the other subsets may change.
    few, many = (phantom.plan_cohort(settings(patients=n, sequences={"t1": 1.0})) for n in (3, 5))
    assert [replace(plan, subset="") for plan in many[:3]] == [replace(plan, subset="") for plan in few]


def test_series_share_a_patients_anatomy_but_no_geometry(plans):
    mine = [plan for plan in plans if plan.patient == plans[0].patient]
    assert len(mine) >= 2
    assert len({json.dumps(phantom.anatomy(plan, SETTINGS), allow_nan=False) for plan in mine}) == 1
    assert len({(plan.size, plan.spacing_mm, plan.rotation_deg) for plan in mine}) == len(mine)
    assert len({plan.sex for plan in mine}) == 1


def test_the_cohort_has_the_planned_shares(plans):
    by_sequence = {name: [plan.patient for plan in plans if plan.sequence == name] for name in ("t1", "t2", "t2_SPACE")}
    assert by_sequence["t1"] == by_sequence["t2"] == ["1", "2", "3", "4", "5", "6"]
    assert len(by_sequence["t2_SPACE"]) == 3
    assert [plan.name for plan in plans[:2]] == ["1_t1", "1_t2"]
    subsets = {(plan.patient, plan.subset) for plan in plans}
    assert len(subsets) == 6  # a patient is on one side only
    assert sorted(subset for _, subset in subsets) == ["training"] * 4 + ["validation"] * 2


def test_a_single_patient_is_for_training():
    assert {plan.subset for plan in phantom.plan_cohort(settings(patients=1))} == {"training"}


def test_geometry_varies_as_the_settings_say(plans):
    rows = [plan.size[1] for plan in plans]
    assert min(rows) >= 110 and max(rows) <= 150 and len(set(rows)) > 5
    for plan in plans:
        slices, rows, columns = plan.size
        assert rows != columns
        assert plan.spacing_mm[1] != plan.spacing_mm[2]
        low, high, count = (0.9, 1.2, (20, 24)) if plan.sequence == "t2_SPACE" else (3.3, 4.8, (11, 13))
        assert low <= plan.spacing_mm[0] <= high
        assert count[0] <= slices <= count[1]
        assert abs(plan.rotation_deg[0]) <= 15 and max(map(abs, plan.rotation_deg[1:])) <= 4
    assert max(abs(plan.rotation_deg[0]) for plan in plans) > 8
    assert len({plan.storage_order for plan in plans}) > 8
    assert {plan.dtype for plan in plans} == {"int16", "uint16"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patients": 0}, r"synthesize\.patients: found 0, expected at least 1"),
        ({"sequences": {"t1": 1.0, "flair": 1.0}}, r"synthesize\.sequences: found \['flair'\], expected names among"),
        ({"field_of_view": {"vertebrae": {11: 1}}}, r"vertebrae: found 11, expected at most 10\. Lower it"),
    ],
)
def test_impossible_settings_say_what_to_change(changes, message):
    with pytest.raises(ValueError, match=message):
        phantom.plan_cohort(settings(**changes))


def test_overview_has_spiders_columns(cohort, plans):
    table = phantom.overview(plans)
    assert table["new_file_name"].tolist() == [plan.name for plan in plans]
    assert set(table["subset"]) == {"training", "validation"}
    assert set(table["sex"]) <= {"F", "M"}
    assert set(table["Manufacturer"]) == {"lumbarflow phantom"}
    assert set(table["SeriesDescription"]) == {"synthetic"}
    first, plan = table.iloc[0], plans[0]
    assert json.loads(first["PixelSpacing"]) == list(plan.spacing_mm[1:])
    assert first["SpacingBetweenSlices"] == plan.spacing_mm[0]
    assert first["SliceThickness"] == plan.slice_thickness_mm <= plan.spacing_mm[0]
    for (_, row), (_, _, mask, _) in zip(table.iterrows(), cohort, strict=True):
        ids = np.unique(mask.array)
        assert row["num_discs"] == (ids > 200).sum()
        # A process of the next one above may be in view without its body.
        assert row["num_vertebrae"] <= len(vertebra_labels(mask)) <= row["num_vertebrae"] + 2


# --- Geometry -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coarse_plan(plans):
    """A plan that renders fast: few large voxels, unequal in number and size, oblique about all three axes."""
    return replace(plans[0], size=(5, 24, 30), spacing_mm=(7.0, 11.0, 6.0), rotation_deg=(9.0, -4.0, 6.0))


def test_there_are_48_storage_orders_both_handed():
    assert len(set(phantom.STORAGE_ORDERS)) == 48
    assert {"LPS", "RAI", "PIR", "ASL"} <= set(phantom.STORAGE_ORDERS)


@pytest.mark.parametrize("order", phantom.STORAGE_ORDERS)
def test_every_storage_order_holds_the_same_scan(coarse_plan, order, tmp_path):
    plan = replace(coarse_plan, storage_order=order)
    image, mask = phantom.render(plan, SETTINGS)
    name = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.direction.ravel())
    assert name == order
    assert image.direction.T @ image.direction == pytest.approx(np.eye(3), abs=1e-12)
    expected = phantom.render(replace(coarse_plan, storage_order="PIR"), SETTINGS)  # the sagittal order itself
    for found, reference in zip((image, mask), expected, strict=True):
        assert sorted(found.array.shape) == [5, 24, 30]
        turned, _ = to_sagittal(found)
        assert np.array_equal(turned.array, reference.array)
        assert turned.spacing_mm == reference.spacing_mm == (6.0, 11.0, 7.0)
        assert turned.origin_mm == pytest.approx(reference.origin_mm)
    # A file keeps it, left-handed or right-handed.
    write_volume(mask, tmp_path / "mask.mha")
    again = read_volume(tmp_path / "mask.mha", LabelMap)
    assert np.array_equal(again.array, mask.array)
    assert again.direction == pytest.approx(mask.direction)
    assert again.origin_mm == pytest.approx(mask.origin_mm)


def test_the_grid_stands_where_the_plan_says(coarse_plan):
    # Rotations of 90 degrees by hand: about x, posterior (+y) turns to superior (+z).
    assert replace(coarse_plan, rotation_deg=(0, 0, 0)).axes == pytest.approx(SAGITTAL_AXES)
    turned = replace(coarse_plan, rotation_deg=(90.0, 0.0, 0.0)).axes
    assert turned == pytest.approx(np.array([[-1, 0, 0], [0, 1, 0], [0, 0, 1]]), abs=1e-12)
    image, _ = phantom.render(coarse_plan, SETTINGS)
    middle = (np.array(image.size) - 1) / 2
    assert image.physical_point(middle) == pytest.approx(coarse_plan.centre_mm)


def test_known_points_lie_in_their_labels(cohort):
    seen = 0
    for plan, _, mask, known in cohort:
        points = [(disc["centre"], disc["id"]) for disc in known["discs"][: plan.discs - 1]]
        for vertebra in known["vertebrae"][: plan.whole_vertebrae]:
            points.append((vertebra["centre"], vertebra["id"]))
            ends = vertebra["canal_ap"]
            points.append(((np.array(ends["from"]) + ends["to"]) / 2, phantom.CANAL_ID))
        # Thin oblique slabs leave the midline towards their ends.
        found = [(label_at(mask, point), label) for point, label in points]
        inside = [pair for pair in found if pair[0] is not None]
        assert all(label == expected for label, expected in inside), plan.name
        assert len(inside) > 0.5 * len(points)
        seen += len(inside)
    assert seen > 200
    assert len({plan.storage_order for plan, *_ in cohort}) > 8


# --- Labels ---------------------------------------------------------------------------------------------------------


def test_ids_rise_from_the_lowest_up_and_alternate(cohort):
    for _plan, _, mask, known in cohort:
        vertebrae = vertebra_labels(mask)
        assert [i % 100 for i in vertebrae] == list(range(1, len(vertebrae) + 1))
        discs = [i for i in np.unique(mask.array).tolist() if i > 200]
        assert discs == list(range(201, 201 + len(discs)))
        assert np.all(np.diff([centroid(mask, i)[2] for i in discs]) > 0)
        heights = [disc["centre"][2] for disc in known["discs"]]
        # Disc n lies between the bodies n - 1 and n.
        bodies = [vertebra["centre"][2] for vertebra in known["vertebrae"]]
        column = [z for pair in zip(heights, bodies, strict=True) for z in pair]
        assert np.all(np.diff(column) > 0)
        assert mask.array.dtype == np.uint8
        assert isinstance(mask, LabelMap)


def test_the_vertebra_cut_by_the_upper_edge_is_numbered_from_101(cohort):
    cut = uncut = 0
    for plan, _, mask, known in cohort:
        ids = set(np.unique(mask.array).tolist())
        assert ids >= set(range(1, plan.whole_vertebrae + 1))
        assert not ids & set(range(plan.whole_vertebrae + 1, 100))
        if plan.vertebrae > plan.whole_vertebrae:
            assert 100 + plan.vertebrae in ids
        sagittal, _ = to_sagittal(mask)
        # The number follows from where the upper endplate lies: inside the first row or above it.
        for vertebra in known["vertebrae"][: plan.vertebrae]:
            ends = [vertebra[f"body_height_{place}"]["to"] for place in ("anterior", "middle", "posterior")]
            rows = [sagittal.index_point(end)[1] for end in ends]
            if vertebra["id"] <= plan.whole_vertebrae:
                uncut += 1
                assert min(rows) > -0.5
            else:
                cut += 1
                assert min(rows) < -0.5
    assert cut >= 3 and uncut >= 30


def test_the_canal_is_one_tube_through_the_middle_slices(cohort):
    for plan, _, mask, _known in cohort:
        sagittal, _ = to_sagittal(mask)
        rows = (sagittal.array == phantom.CANAL_ID).any(axis=(0, 2))
        assert rows[: int(0.8 * plan.size[1])].all(), plan.name
        discs, canal = sagittal.array > 200, sagittal.array == phantom.CANAL_ID
        names = np.where(discs, "disc", np.where(canal, "canal", np.where(sagittal.array > 0, "vertebra", "")))
        classes = [len(np.unique(one)) for one in names]
        assert max(classes) == 4
        if plan.sequence != "t2_SPACE":
            # Further to the side there is less of it.
            per_slice = canal.sum(axis=(1, 2))
            assert min(per_slice[0], per_slice[-1]) < 0.5 * per_slice.max()


def test_the_sacrum_is_bone_without_a_label(cohort):
    inside = 0
    for plan, _, mask, known in cohort:
        anterior, posterior = (np.array(point) for point in known["endplates"]["S1"])
        along = (posterior - anterior) / np.linalg.norm(posterior - anterior)
        inferior = np.array([0.0, along[2], -along[1]])  # along the normal of the endplate, downwards
        assert inferior[2] < 0
        assert label_at(mask, (anterior + posterior) / 2 + 10 * inferior) in (0, None), plan.name
        inside += label_at(mask, (anterior + posterior) / 2 - 5 * inferior) == 201  # the disc on the other side
    assert inside > len(cohort) / 2


# --- The image ------------------------------------------------------------------------------------------------------


def mean_signal(image: Volume, mask: LabelMap, labels) -> float:
    return float(image.array[np.isin(mask.array, labels)].mean())


def test_contrasts_are_those_of_t1_and_t2(cohort):
    for plan, image, mask, _ in cohort:
        csf = mean_signal(image, mask, [100])
        marrow = mean_signal(image, mask, list(range(1, 6)))
        if plan.sequence == "t1":
            assert csf < 0.8 * marrow, plan.name
        else:
            assert csf > 1.5 * marrow, plan.name
        assert image.array.dtype == np.dtype(plan.dtype)
        assert image.array.min() >= 0
        assert image.array.max() > 0.3 * plan.intensity


def test_a_worn_disc_is_darker_on_t2(plans):
    fresh, worn = (settings(anatomy={"degeneration": [share, share]}, noise=[0.0, 0.0]) for share in (0.0, 3.0))
    plan = next(plan for plan in plans if plan.sequence == "t2")
    ratios, heights = [], []
    for chosen in (fresh, worn):
        image, mask = phantom.render(plan, chosen)
        known = phantom.anatomy(plan, chosen)
        ratios.append(mean_signal(image, mask, [201, 202, 203]) / mean_signal(image, mask, [1, 2, 3]))
        heights.append(known["discs"][1]["height_middle"]["mm"])
        assert {disc["grade"] for disc in known["discs"][:4]} == ({1} if chosen is fresh else {5})
    assert ratios[0] > 1.5 * ratios[1]
    assert heights[0] > heights[1] + 1.0


def test_noise_and_bias_follow_the_settings(plans):
    # Rician noise: of width sigma where there is much signal, of mean sigma * sqrt(pi / 2) where there is none.
    plan = replace(plans[0], intensity=10_000.0)
    noisy, _ = phantom.render(plan, settings(noise=[0.02, 0.02]))
    clean, _ = phantom.render(plan, settings(noise=[0.0, 0.0]))
    bright, air = clean.array > 2000, clean.array < 60
    assert np.std(noisy.array[bright].astype(float) - clean.array[bright]) == pytest.approx(200, rel=0.05)
    assert noisy.array[air].mean() == pytest.approx(200 * math.sqrt(math.pi / 2), rel=0.05)
    flat = settings(noise=[0.0, 0.0], bias={"coil_depth_mm": [1e9, 1e9], "amplitude": 0.0, "edge_drop": 0.0})
    even, _ = phantom.render(plan, flat)
    field = clean.array[even.array > 1000] / even.array[even.array > 1000]
    assert field.min() < 0.6 * field.max()


# --- Known anatomy --------------------------------------------------------------------------------------------------


def chord_in_raster(plan, mask: LabelMap, chord: dict, labels: set[int]) -> float:
    """Length (mm) of the run of `labels` along the chord's own line, read from a one-slice mask."""
    first, last = np.array(chord["from"]), np.array(chord["to"])
    direction = (last - first) / np.linalg.norm(last - first)
    step = 0.02
    distances = np.arange(-6.0, np.linalg.norm(last - first) + 6.0, step)
    points = first + distances[:, None] * direction
    index = np.rint((points - plan.first_mm) @ plan.axes.T / np.array(plan.spacing_mm)).astype(int)
    inside = np.isin(mask.array[0, index[:, 1], index[:, 2]], list(labels))
    # Only the run around the chord's middle counts: a neighbour of the same label may follow.
    middle = int(np.argmin(np.abs(distances - np.linalg.norm(last - first) / 2)))
    assert inside[middle]
    before, after = inside[:middle][::-1], inside[middle:]
    return step * (int(np.argmin(before)) + int(np.argmin(after)))


@pytest.mark.parametrize("patient", ["1", "4"])
def test_known_anatomy_agrees_with_a_fine_raster(patient):
    chosen = settings(anatomy={"scoliosis_mm": 0.0}, oblique_deg={"in_plane": 10, "through_plane": 0})
    chosen["acquisition"]["thick"]["samples"] = 1
    plan = next(plan for plan in phantom.plan_cohort(chosen) if plan.patient == patient and plan.sequence == "t2")
    pixel = (0.3, 0.25)
    size = tuple(round(n * mm / fine) for n, mm, fine in zip(plan.size[1:], plan.spacing_mm[1:], pixel, strict=True))
    fine = replace(plan, size=(1, *size), spacing_mm=(4.0, *pixel), storage_order="PIR")
    _, mask = phantom.render(fine, chosen)
    known = phantom.anatomy(fine, chosen)
    names = {"height_anterior", "height_middle", "height_posterior", "depth"}
    checked = 0
    for vertebra in known["vertebrae"][: plan.whole_vertebrae]:
        for name in names:
            chord = vertebra[f"body_{name}"]
            assert chord["mm"] == pytest.approx(math.dist(chord["from"], chord["to"]), abs=1e-3)
            assert chord_in_raster(fine, mask, chord, {vertebra["id"]}) == pytest.approx(chord["mm"], abs=0.3)
        canal = vertebra["canal_ap"]
        assert chord_in_raster(fine, mask, canal, {100}) == pytest.approx(canal["mm"], abs=0.3)
        checked += 1
    for disc in known["discs"][: plan.whole_vertebrae]:
        for name in names:
            assert chord_in_raster(fine, mask, disc[name], {disc["id"]}) == pytest.approx(disc[name]["mm"], abs=0.3)
        canal = disc["canal_ap"]
        assert chord_in_raster(fine, mask, canal, {100}) == pytest.approx(canal["mm"], abs=0.3)
    assert checked >= 5


def test_lengths_and_angles_are_those_of_adults(plans):
    for plan in plans:
        known = phantom.anatomy(plan, SETTINGS)
        # The Cobb angle from the drawn endplates alone: both run from anterior to posterior.
        tilt = {}
        for name, (anterior, posterior) in known["endplates"].items():
            tilt[name] = math.degrees(math.atan2(posterior[2] - anterior[2], posterior[1] - anterior[1]))
        assert known["lordosis_deg"] == pytest.approx(tilt["S1"] - tilt["L1"], abs=0.05)
        assert 30 < known["lordosis_deg"] < 66
        for vertebra in known["vertebrae"][:5]:
            assert 20 < vertebra["body_height_middle"]["mm"] < 33
            assert 26 < vertebra["body_depth"]["mm"] < 42
            assert 10 < vertebra["canal_ap"]["mm"] < 20
            # The canal runs close behind the body.
            assert 1 < math.dist(vertebra["body_depth"]["to"], vertebra["canal_ap"]["from"]) < 5
        for disc in known["discs"][:5]:
            assert 6 < disc["height_middle"]["mm"] < 16
        lowest_disc, lowest_body = known["discs"][0], known["vertebrae"][0]
        # The lordosis opens the lowest disc and wedges L5, both towards the front.
        assert lowest_disc["height_anterior"]["mm"] > lowest_disc["height_posterior"]["mm"] + 2
        assert lowest_body["body_height_anterior"]["mm"] > lowest_body["body_height_posterior"]["mm"] + 1
    levels = [vertebra["level"] for vertebra in known["vertebrae"]]
    assert levels[:6] == ["L5", "L4", "L3", "L2", "L1", "T12"]
    assert [disc["level"] for disc in known["discs"][:2]] == ["L5/S1", "L4/L5"]


def test_the_tilt_of_an_endplate_lifts_its_posterior_end(plans):
    known = phantom.anatomy(plans[0], SETTINGS)
    lowest, top = known["vertebrae"][0], known["vertebrae"][4]
    # The drawn endplate of L1, which runs from anterior to posterior.
    anterior, posterior = known["endplates"]["L1"]
    slope = math.degrees(math.atan2(posterior[2] - anterior[2], posterior[1] - anterior[1]))
    assert top["upper_tilt_deg"] == pytest.approx(slope, abs=0.01)
    assert lowest["lower_tilt_deg"] > 0 > top["upper_tilt_deg"]
    for vertebra in known["vertebrae"]:
        # What the endplates lean against each other is what the front of the body is higher, over 0.7 of its depth.
        front, back = vertebra["body_height_anterior"], vertebra["body_height_posterior"]
        apart = math.dist(*(np.add(chord["from"], chord["to"]) / 2 for chord in (front, back)))
        wedge = 2 * math.degrees(math.atan((front["mm"] - back["mm"]) / 2 / apart))
        assert vertebra["lower_tilt_deg"] - vertebra["upper_tilt_deg"] == pytest.approx(wedge, abs=0.05)
    # The discs between them and above the sacrum make up the rest of the lordosis.
    assert 10 < lowest["lower_tilt_deg"] - top["upper_tilt_deg"] < known["lordosis_deg"] - 5


def test_heights_are_taken_across_the_mean_of_both_endplates(plans):
    known = phantom.anatomy(plans[0], SETTINGS)
    for part, prefix in [(v, "body_") for v in known["vertebrae"]] + [(d, "") for d in known["discs"]]:
        front, middle, back = (part[f"{prefix}height_{place}"] for place in ("anterior", "middle", "posterior"))
        lower, upper = (np.subtract(back[end], front[end]) / np.linalg.norm(np.subtract(back[end], front[end]))
                        for end in ("from", "to"))  # fmt: skip
        height, mean = np.subtract(middle["to"], middle["from"])[1:], (lower + upper)[1:]
        cosine = height @ mean / np.linalg.norm(height) / np.linalg.norm(mean)
        assert math.degrees(math.acos(cosine)) == pytest.approx(90, abs=1.0)
