"""The page of a case: what it holds, and what a person sees and does in a browser."""

from __future__ import annotations

import base64
import gzip
import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lumbarflow import viewer
from lumbarflow.imaging import SAGITTAL_AXES, LabelMap, Volume, read_volume
from lumbarflow.labels import MISSED, PALETTE

HOSTILE = "</script><b>\"'&amp; {{image}}"
# Columns of the direction: index x (columns, to posterior), y (rows, to inferior), z (slices, to the right); turned
# about the patient's long axis.
SAGITTAL = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]) @ SAGITTAL_AXES[::-1].T


def unpacked(embedded: str, path) -> Volume:
    path.write_bytes(base64.b64decode(embedded))
    return read_volume(path)


def texts(page: str, tag: str) -> list[str]:
    return [re.sub("<[^>]*>", "", inner) for inner in re.findall(f"<{tag}[ >].*?</{tag}>", page, flags=re.S)]


@pytest.fixture
def library(monkeypatch):
    """Another library than NiiVue, since packing that takes seconds."""
    monkeypatch.setattr(viewer, "niivue", lambda: viewer.Niivue("bGli", "ipyniivue 0", "Copyright <somebody>"))


def case(shift=1) -> tuple[Volume, LabelMap, LabelMap]:
    """Five slices: two vertebrae with a disc between them and a canal behind, the prediction `shift` rows too low."""
    classes = np.zeros((5, 64, 44), np.uint8)
    classes[1:4, 6:24, 8:28], classes[1:4, 24:31, 8:28], classes[1:4, 31:52, 8:28] = 1, 3, 1
    classes[1:4, :, 31:38] = 2
    geometry = {"spacing_mm": (1.5, 1.25, 4.0), "origin_mm": (9.0, -30.0, 40.0), "direction": SAGITTAL}
    image = np.add.outer(np.arange(5) * 100, classes[2] * 40 + 50).astype(np.int16)
    image += np.arange(44, dtype=np.int16)
    predicted = np.roll(classes, shift, axis=1)
    return Volume(image, **geometry), LabelMap(classes, **geometry), LabelMap(predicted, **geometry)


FIGURES = pd.DataFrame(
    {
        "series": "7_t2", "patient": "7", "class": ["background", "vertebrae", "canal", "IVD"],
        "dice": [0.99, 0.9123, 0.8, np.nan], "asd_mm": [np.nan, 1.25, 2.5, np.inf],
        "reference_components": [np.nan, 2.0, np.nan, 1.0], "missing": ["", "", "", "prediction"], "whole": True,
    }
)  # fmt: skip


# --- what the page holds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32])
def test_an_embedded_volume_has_the_same_voxels_at_the_same_places(make_volume, tmp_path, dtype):
    volume = make_volume((4, 6, 5), dtype=dtype)  # unequal spacings, an oblique direction
    read = unpacked(viewer.embedded_volume(volume), tmp_path / "v.nii.gz")
    assert read.array.dtype == dtype
    np.testing.assert_array_equal(read.array, volume.array)
    for index in ((0, 0, 0), (4, 0, 0), (0, 5, 0), (0, 0, 3), (2, 3, 1)):
        np.testing.assert_allclose(read.physical_point(index), volume.physical_point(index), atol=1e-4)


def test_what_niivue_does_not_draw_is_embedded_as_float32(make_volume, tmp_path):
    read = unpacked(viewer.embedded_volume(make_volume((2, 3, 4), dtype=np.int64)), tmp_path / "v.nii.gz")
    assert read.array.dtype == np.float32
    np.testing.assert_array_equal(read.array, make_volume((2, 3, 4), dtype=np.int64).array)


def test_the_rim_of_a_structure_is_told_from_its_inside():
    classes = np.zeros((1, 5, 6), np.uint8)
    classes[0, 1:4, 1:5], classes[0, 1:4, 5] = 1, 3
    assert viewer.outlined(classes)[0].tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 4, 4, 4, 4, 6],
        [0, 4, 1, 1, 4, 6],  # the disc touches the picture's edge, where nobody knows what lies behind
        [0, 4, 4, 4, 4, 6],
        [0, 0, 0, 0, 0, 0],
    ]
    # Neighbouring slices make no rim: an outline is drawn in the sagittal plane.
    assert viewer.outlined(np.ones((3, 3, 3), np.uint8))[:, 1, 1].tolist() == [1, 1, 1]
    assert viewer.outlined(classes).dtype == np.uint8


def test_differences_name_both_classes():
    reference, prediction = np.array([[[0, 1, 2, 3, 2]]], np.uint8), np.array([[[0, 1, 0, 1, 3]]], np.uint8)
    assert viewer.differences(reference, prediction).tolist() == [[[0, 0, 8, 13, 11]]]
    assert viewer.differences(prediction, reference).tolist() == [[[0, 0, 2, 7, 14]]]


def test_levels_are_measured_on_both_sides():
    _, reference, prediction = case(shift=0)
    lower = prediction.array.copy()
    lower[:, 49:52, :28] = 0  # the lower vertebra loses three rows of 1.25 mm
    table = viewer.level_table(reference, reference.with_array(lower))
    assert table["structure"].unique().tolist() == ["vertebra", "disc", "spine"]
    rows = table.set_index(["structure", "number", "quantity"])
    height = rows.loc[("vertebra", 1, "body_height_middle")]
    assert height["reference"] == pytest.approx(21 * 1.25, abs=0.2)
    assert height["prediction"] == pytest.approx(18 * 1.25, abs=0.2)
    assert (height["unit"], height["notes"]) == ("mm", "")
    # Only one side has the disc: its values stand alone, and why others are missing is told by side.
    lower[lower == 3] = 0
    table = viewer.level_table(reference, reference.with_array(lower))
    rows = table.set_index(["structure", "number", "quantity"])
    disc = rows.xs("disc", level="structure").droplevel("number").loc["depth"]
    assert disc["reference"] == pytest.approx(20 * 1.5, abs=0.2) and np.isnan(disc["prediction"])
    lordosis = rows.xs("lordosis", level="quantity").iloc[0]
    assert lordosis["notes"].startswith("reference: ") and "; prediction: " in lordosis["notes"]


def test_the_page_holds_tables_notice_licence_and_the_palette(library):
    page = viewer.case_page("7_t2", *case(), FIGURES, "w1")
    cells = re.findall(r'<tr><th scope="row">Dice</th>(.*?)</tr>', page)[0]
    assert re.findall(">([^<]*)</td>", cells) == ["0.912", "0.800", "–"]
    components = re.findall(r'<tr><th scope="row">reference components</th>(.*?)</tr>', page)[0]
    assert re.findall(">([^<]*)</td>", components) == ["2", "–", "1"]
    missing = re.findall(r'<tr><th scope="row">missing</th>(.*?)</tr>', page)[0]
    assert re.findall(">([^<]*)</td>", missing) == ["none", "none", "prediction"]
    assert '<td class="number">∞</td>' in page
    assert texts(page, "figcaption")[1:] == [
        "Vertebrae, in mm, from the lowest up",
        "Discs, in mm, from the lowest up",
        "Spine, in degrees",
    ]
    assert "not a medical device" in page
    assert "Copyright &lt;somebody&gt;" in page
    content = json.loads(texts(page, "script")[0])
    assert content["colours"] == {
        "classes": [PALETTE[name] for name in ("vertebrae", "canal", "IVD")],
        "missed": MISSED,
    }
    for name, colour in (PALETTE | {"missed": MISSED}).items():
        assert name == "background" or f"--{name}: {colour};" in page
    # No patient, no other series: nothing but the name that was asked for.
    assert "patient" not in page.replace("few patients", "").replace("patient's left", "")
    assert viewer.model_of(page) == "w1" and viewer.model_of("<html>") is None


def test_the_page_holds_what_the_volumes_hold(library, tmp_path):
    image, reference, prediction = case()
    page = viewer.case_page("7_t2", image, reference, prediction, FIGURES, "w1")
    embedded = dict(re.findall(r'<script type="text/plain" id="(\w+)">([^<]*)</script>', page))
    read = {name: unpacked(embedded[name], tmp_path / f"{name}.nii.gz") for name in embedded if name != "library"}
    np.testing.assert_array_equal(read["image"].array, image.array)
    for name, mask in (("reference", reference), ("prediction", prediction)):
        values = read[name].array.astype(int)
        np.testing.assert_array_equal(np.where(values > 0, (values - 1) % 3 + 1, 0), mask.array)
    np.testing.assert_array_equal(read["differences"].array > 0, reference.array != prediction.array)
    for volume in read.values():
        np.testing.assert_allclose(volume.physical_point((3, 5, 4)), image.physical_point((3, 5, 4)), atol=1e-4)
    # Equal cases are equal pages.
    assert viewer.case_page("7_t2", image, reference, prediction, FIGURES, "w1") == page


def test_names_cannot_leave_their_places(library):
    plain = viewer.case_page("7_t2", *case(), FIGURES, "w1")
    page = viewer.case_page(HOSTILE, *case(), FIGURES, "w1")
    assert page.count("</script>") == plain.count("</script>")
    assert "<b>" not in page
    assert texts(page, "h1") == ["&lt;/script&gt;&lt;b&gt;&quot;&#x27;&amp;amp; {{image}}"]


def test_the_browser_is_told_to_load_nothing(library):
    page = viewer.case_page("7_t2", *case(), FIGURES, "w1")
    policy = re.search('Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; script-src 'unsafe-inline' blob:;")
    assert not re.search(r"\b(src|href|action)\s*=", page)


def test_a_case_of_a_split_by_slice_says_that_the_net_may_know_some_of_its_slices(library):
    said = "Not all slices shown were tested"
    assert said not in viewer.case_page("7_t2", *case(), FIGURES, "w1")
    assert said in viewer.case_page("7_t2", *case(), FIGURES.assign(whole=False), "w1")


def test_grids_of_different_sizes_have_no_page(library):
    image, reference, prediction = case()
    cut = LabelMap(prediction.array[:4], prediction.spacing_mm, prediction.origin_mm, prediction.direction)
    with pytest.raises(ValueError, match=r"7_t2: an image of \(44, 64, 5\) .* a prediction of \(44, 64, 4\); expected"):
        viewer.case_page("7_t2", image, reference, cut, FIGURES, "w1")


def test_cases_are_chosen_by_name_or_in_words():
    cases = ["9_t2", "7_t1", "8"]
    assert viewer.chosen_cases("7_t1", cases, []) == ["7_t1"]
    assert viewer.chosen_cases(8, cases, []) == ["8"]
    assert viewer.chosen_cases("all", cases, ["8"]) == cases
    assert viewer.chosen_cases("shown", cases, ["8", "7_t1", "8"]) == ["8", "7_t1"]
    with pytest.raises(ValueError, match="no test case '7_t2'; expected 'shown', 'all' or one of 7_t1, 8, 9_t2"):
        viewer.chosen_cases("7_t2", cases, [])


# --- the library -----------------------------------------------------------------------------------------------------


def encoded(code: str) -> str:
    from urllib.parse import quote

    return quote("/*" + "x" * 200_000 + "*/" + code, safe="-_.!~*'()")


def test_the_library_is_found_by_what_it_exports():
    code = "class A{};const v='a';export{A as Niivue,NVImage,SLICE_TYPE};"
    found = viewer._library(f'var o2="{encoded(code)}";export{{Ih as default}};')
    assert found.endswith(code)
    assert viewer._library(f'var o2="{encoded("export{Niivue,NVImage};")}"') is None
    assert viewer._library(f'var o2="{encoded("export{Niivue as A,NVImage,SLICE_TYPE};")}"') is None
    assert viewer._library("export{Niivue,NVImage,SLICE_TYPE};") is None


def test_the_installed_ipyniivue_has_the_library():
    library = viewer.niivue()
    code = gzip.decompress(base64.b64decode(library.packed)).decode()
    assert "class Niivue" in code or "Niivue=class" in code
    assert library.licence.startswith("BSD 2-Clause License") and "Niivue" in library.licence
    assert re.fullmatch(r"ipyniivue 2\.\d+\.\d+", library.source)


def test_without_ipyniivue_or_its_library_one_message_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(
        viewer.metadata, "distribution", lambda name: SimpleNamespace(
            version="3.0", locate_file=lambda path: tmp_path / path, read_text=lambda path: "licence"
        )
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="widget.js: no NiiVue library .* in ipyniivue 3.0; expected .* Run: pip"):
        viewer.niivue.__wrapped__()

    def absent(name):
        raise viewer.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(viewer.metadata, "distribution", absent)
    with pytest.raises(RuntimeError, match="ipyniivue: not installed; expected .* Run: pip install ipyniivue"):
        viewer.niivue.__wrapped__()


# --- what a person sees and does -------------------------------------------------------------------------------------


@pytest.mark.integration
def test_a_person_scrolls_and_toggles(page, artefacts, tmp_path):
    from PIL import Image

    image, reference, prediction = case(shift=4)
    file = tmp_path / "7_t2.html"
    file.write_text(viewer.case_page("7_t2", image, reference, prediction, FIGURES, "w1"), encoding="utf-8")
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]", timeout=60_000)

    def picture(name: str) -> np.ndarray:
        """What is drawn now; it is kept."""
        page.wait_for_timeout(150)
        path = artefacts / f"viewer_{name}.png"
        page.screenshot(path=path)
        x, y, width, height = (
            int(page.locator("#canvas").bounding_box()[side]) for side in ("x", "y", "width", "height")
        )
        return np.asarray(Image.open(path).convert("RGB"))[y : y + height, x : x + width].astype(int)

    def share(drawn: np.ndarray, colour: str) -> float:
        """Of the pixels that have this colour as it is."""
        rgb = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
        return float(np.mean(np.abs(drawn - rgb).max(axis=-1) <= 6))

    start = picture("start")
    assert len(np.unique(start.reshape(-1, 3), axis=0)) > 50
    assert page.inner_text("#message") == ""
    assert page.inner_text("#number") == "slice 3 of 5"
    # NiiVue counts from the left, from behind and from below, and starts at voxel (2, 22, 32) of 5 x 44 x 64: that is
    # slice 2, column 43 - 22 = 21, row 63 - 32 = 31: 2 * 4 mm along (-0.8, -0.6, 0), 21 * 1.5 mm along (-0.6, 0.8, 0)
    # and 31 * 1.25 mm down from (9, -30, 40), which is (-16.3, -9.6, 1.25) in LPS. There, the image is
    # 2 * 100 + 90 + 21, the reference the lower vertebra, and the prediction, four rows lower, still the disc.
    assert re.fullmatch(
        r"16\.3 mm right, 9\.6 mm anterior, 1\.[23] mm superior · intensity 311 · reference vertebrae · prediction IVD",
        page.inner_text("#place"),
    )

    # The prediction's outline is opaque, in the classes' own colours; filled reference shines through.
    assert min(share(start, PALETTE[name]) for name in ("vertebrae", "canal", "IVD")) > 0.001
    # Anterior is on the left: the canal lies behind the bodies.
    assert page.locator(".edge").all_inner_texts() == ["A", "P", "S", "I"]
    half = start.shape[1] // 2
    assert share(start[:, :half], PALETTE["canal"]) == 0 < share(start[:, half:], PALETTE["canal"])
    page.keyboard.press("p")
    without = picture("reference")
    assert share(without, PALETTE["vertebrae"]) == 0
    assert page.locator('.show[data-layer="prediction"]').get_attribute("aria-pressed") == "false"
    page.keyboard.press("r")
    bare = picture("image")
    assert np.abs(bare[..., 0] - bare[..., 2]).max() <= 2, "without overlays, the picture is grey"

    # Keys change the slice; each is 100 brighter than the one before.
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#number") == "slice 4 of 5"
    assert picture("next_slice").mean() > bare.mean() + 2
    page.keyboard.press("Home")
    assert page.inner_text("#number") == "slice 1 of 5"
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#number") == "slice 1 of 5"
    page.keyboard.press("PageDown")
    assert page.inner_text("#number") == "slice 5 of 5"
    # Two slices of 4 mm on: (-6.4, -4.8, 0) mm.
    assert page.inner_text("#place").startswith("22.7 mm right, 14.4 mm anterior, ")
    assert "intensity 511" in page.inner_text("#place")
    # So does the wheel.
    page.locator("#canvas").hover()
    page.mouse.wheel(0, -100)
    page.wait_for_function("document.getElementById('number').textContent === 'slice 4 of 5'")

    # Differences, in the colour of what was predicted, or green; a class can be left out of them.
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("d")
    differences = picture("differences")
    assert share(differences, PALETTE["IVD"]) > 0.001 and share(differences, MISSED) > 0.001
    page.keyboard.press("3")
    assert page.locator('.class[data-layer="reference"][data-class="3"]').get_attribute("aria-pressed") == "false"
    page.keyboard.press("1")
    assert share(picture("differences_without_vertebrae_and_discs"), PALETTE["IVD"]) == 0
    page.keyboard.press("1")
    page.keyboard.press("3")
    page.keyboard.press("d")

    # The same with the mouse, and the other planes.
    page.get_by_role("button", name="Show prediction").click()
    page.get_by_role("button", name="Prediction: outlines only").click()
    page.get_by_role("button", name="Prediction: canal").click()
    filled = picture("prediction_filled")
    assert np.abs(filled - bare).max() > 20 and share(filled, PALETTE["vertebrae"]) == 0
    page.get_by_role("button", name="all three").click()
    assert np.abs(picture("all_planes") - filled).max() > 20
    page.keyboard.press("a")
    assert page.inner_text("#number").endswith(" of 64")
    # The patient's right, where slices are brighter, is on the left, as the letters say.
    axial = picture("axial")
    drawn = np.flatnonzero(axial[:, :, 0].mean(axis=0) > 1)
    assert axial[:, drawn[: len(drawn) // 2]].mean() > axial[:, drawn[len(drawn) // 2 :]].mean() + 20
    assert page.locator(".edge").all_inner_texts() == ["R", "L", "A", "P"]
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    picture("keys")
    page.get_by_role("button", name="close").click()
    assert not page.locator("#keys").is_visible()

    assert page.locator("tr", has_text="Dice").locator("td").all_inner_texts() == ["0.912", "0.800", "–"]
    page.screenshot(path=artefacts / "viewer_whole_page.png", full_page=True)


@pytest.mark.integration
def test_a_browser_that_cannot_draw_says_so_and_shows_the_tables(page, library, tmp_path):
    file = tmp_path / "7_t2.html"
    file.write_text(viewer.case_page("7_t2", *case(), FIGURES, "w1"), encoding="utf-8")
    page.goto(file.as_uri())  # its library is none
    page.wait_for_function("document.getElementById('message').textContent.startsWith('The scan cannot be shown')")
    assert page.locator("tr", has_text="Dice").count() == 1
