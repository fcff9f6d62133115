from __future__ import annotations

import struct
import warnings

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from lumbarflow.figures import (
    MISSED,
    SIDE_GREYS,
    Overlay,
    case_distribution,
    colour_labels,
    comparison_figure,
    confusion_figure,
    measurement_figure,
    overlay_figure,
    png,
    preview_figure,
    reliability_figure,
    slices_figure,
    split_figure,
    training_curves,
)
from lumbarflow.imaging import SAGITTAL_AXES, LabelMap, Volume
from lumbarflow.labels import CLASSES, PALETTE
from lumbarflow.measurements import Measurement
from lumbarflow.uncertainty import BINS, reliability_table


def test_labels_take_the_palettes_colours_and_background_is_clear():
    colours = colour_labels(np.array([[0, 1], [2, 3]], np.uint8), opacity=0.5)
    assert colours.shape == (2, 2, 4)
    assert colours[0, 0].tolist() == [0, 0, 0, 0]
    for place, name in (((0, 1), "vertebrae"), ((1, 0), "canal"), ((1, 1), "IVD")):
        np.testing.assert_allclose(colours[place], [*to_rgb(PALETTE[name]), 0.5])


def test_overlays_show_each_case_in_its_aspect_with_what_was_missed_in_green():
    reference, prediction = np.zeros((6, 8), np.uint8), np.zeros((6, 8), np.uint8)
    reference[1, 1], prediction[2, 2] = 1, 3
    overlay = Overlay("worst: x", np.arange(48.0).reshape(6, 8), reference, prediction, (2.0, 1.0))
    figure = overlay_figure([overlay, overlay])
    rows = figure.axes
    assert len(rows) == 8
    assert rows[0].get_title("left").startswith("worst: x")
    assert all(axis.get_aspect() == 2.0 for axis in rows)
    errors = rows[3].images[1].get_array()
    np.testing.assert_allclose(errors[1, 1], [*to_rgb(MISSED), 0.9])
    np.testing.assert_allclose(errors[2, 2], [*to_rgb(PALETTE["IVD"]), 0.9])
    assert errors[0, 0, 3] == 0
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(CLASSES[1:])


def test_the_confusion_figure_gives_shares_of_the_reference():
    confusion = np.array([[8, 2, 0, 0], [1, 3, 0, 0], [0, 0, 5, 0], [0, 0, 0, 0]])
    axis = confusion_figure(confusion).axes[0]
    texts = [text.get_text() for text in axis.texts]
    assert texts[0] == "0.800\n8"
    assert texts[4] == "0.250\n1"
    assert texts[15] == "0.000\n0"  # a class without a voxel divides by nothing
    assert axis.get_ylabel() == "reference"


@pytest.fixture
def history():
    return pd.DataFrame(
        {
            "epoch": [1, 2, 3, 4],
            "loss": [0.5, 0.4, 0.3, 0.2],
            "val_loss": [0.6, 0.5, 0.45, 0.5],
            "val_mean_iou": [0.2, 0.6, 0.6, 0.5],
            "learning_rate": [1e-3, 7e-4, 3e-4, 0.0],
        }
    )


def test_training_curves_mark_the_first_of_the_best_epochs(history):
    losses, score, rate = training_curves(history).axes
    assert [line.get_label() for line in losses.lines] == ["training", "validation"]
    assert losses.lines[0].get_ydata().tolist() == [0.5, 0.4, 0.3, 0.2]
    assert losses.lines[1].get_ydata().tolist() == [0.6, 0.5, 0.45, 0.5]
    assert len({(line.get_marker(), line.get_linestyle()) for line in losses.lines}) == 2  # not by colour alone
    curve, star = score.lines
    assert curve.get_ydata().tolist() == [0.2, 0.6, 0.6, 0.5]
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([2], [0.6])
    assert star.get_label() == "best: epoch 2, 0.600"
    assert rate.lines[0].get_ydata().tolist() == [1e-3, 7e-4, 3e-4, 0.0]
    assert all(axis.get_xlabel() == "epoch" for axis in (losses, score, rate))
    # A class's colour is that class, in every figure.
    used = {to_rgb(line.get_color()) for axis in (losses, score, rate) for line in axis.lines}
    assert not used & {to_rgb(PALETTE[name]) for name in CLASSES[1:]}


@pytest.fixture
def by_case():
    dice = {"vertebrae": [0.9, 0.8, 0.9, 0.7], "canal": [0.6, np.nan, 0.5, np.inf], "IVD": [np.nan] * 4}
    rows = [
        {"series": f"{i}_t1", "patient": f"{i}", "class": name, "dice": value, "asd_mm": 1.0 + i}
        for name, values in {"background": [0.99] * 4, **dice}.items()
        for i, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_every_case_has_a_dot_and_what_is_undefined_is_counted(by_case):
    dice, asd = case_distribution(by_case, ("dice", "asd_mm")).axes
    dots = {line.get_label(): line for line in dice.lines if line.get_label() in CLASSES}
    assert {name: sorted(line.get_ydata()) for name, line in dots.items()} == {
        "vertebrae": [0.7, 0.8, 0.9, 0.9],
        "canal": [0.5, 0.6],
    }
    assert [label.get_text() for label in dice.get_xticklabels()] == [
        "vertebrae\nn = 4\nundefined: 0",
        "canal\nn = 2\nundefined: 2",
        "IVD\nn = 0\nundefined: 4",
    ]
    # Two equal cases stand apart, and all of them within their own class's place.
    places = dots["vertebrae"].get_xdata()
    assert len(set(places)) == 4
    assert np.all(np.abs(places) <= 0.2)
    assert np.all(np.abs(dots["canal"].get_xdata() - 1) <= 0.2)
    assert dots["vertebrae"].get_color() == PALETTE["vertebrae"]
    assert len({line.get_marker() for line in dots.values()}) == 2
    assert asd.get_ylabel() == "average surface distance (mm)"


@pytest.mark.parametrize(("metrics", "named"), [(["dice", "hd95_mm"], r"\['hd95_mm'\]"), ([], "none named")])
def test_a_metric_that_nobody_measured_is_refused(by_case, metrics, named):
    with pytest.raises(ValueError, match=rf"do not have: {named}; expected some of \['dice', 'asd_mm'\]"):
        case_distribution(by_case, metrics)


@pytest.fixture
def comparison():
    columns = ["mark", "source", "data", "unit", "class", "dice", "dice_low", "dice_high", "dice_sd"]
    nan = np.nan
    return pd.DataFrame(
        [
            ("", "lumbarflow", "t2", "case mean", "vertebrae", 0.9, 0.85, 0.93, nan),
            ("", "lumbarflow", "t2", "case mean", "canal", 0.8, nan, nan, nan),
            ("‡", "nnU-Net", "", "scans", "vertebrae", 0.92, nan, nan, 0.05),
            ("‡", "nnU-Net", "", "scans", "IVD", nan, nan, nan, nan),
            ("", "lumbarflow", "t2", "case mean", "mean foreground", 0.85, nan, nan, nan),
        ],
        columns=columns,
    )


def test_the_comparison_draws_intervals_and_tells_other_protocols_by_hollow_markers(comparison):
    figure = comparison_figure(comparison)
    vertebrae, canal, disc = figure.axes
    interval, ours, deviation, other = vertebrae.lines
    assert (list(interval.get_xdata()), interval.get_linestyle()) == ([0.85, 0.93], "-")
    np.testing.assert_allclose(deviation.get_xdata(), [0.87, 0.97])
    assert deviation.get_linestyle() == ":"
    assert (list(ours.get_xdata()), list(ours.get_ydata())) == ([0.9], [0])
    assert (list(other.get_xdata()), list(other.get_ydata())) == ([0.92], [1])
    assert (ours.get_markerfacecolor(), other.get_markerfacecolor()) == (PALETTE["vertebrae"], "white")
    assert [len(axis.lines) for axis in (canal, disc)] == [1, 0]
    labels = [label.get_text() for label in vertebrae.get_yticklabels()]
    assert labels == ["lumbarflow\nt2; case mean", "‡ nnU-Net\nscans"]
    low, high = vertebrae.get_ylim()
    assert low > high  # the first row stands at the top


def test_a_comparison_without_a_dice_is_refused(comparison):
    with pytest.raises(ValueError, match=r"no Dice of \['vertebrae', 'canal', 'IVD'\]; expected a row"):
        comparison_figure(comparison.assign(dice=np.nan))


@pytest.fixture
def reliability():
    """Vertebrae in two bins and discs in one; no canal."""
    counts = np.zeros((3, BINS, 3))
    counts[0, 2], counts[0, 9], counts[2, 5] = (10, 2.5, 4), (30, 28.5, 24), (1, 0.5, 0)
    return reliability_table(counts)


def test_reliability_is_drawn_against_what_can_be_believed(reliability):
    figure = reliability_figure(reliability)
    vertebrae, canal, disc, *pixels = figure.axes
    believed, curve = vertebrae.lines
    assert (list(believed.get_xdata()), list(believed.get_ydata())) == ([0, 1], [0, 1])
    np.testing.assert_allclose(curve.get_xdata(), [0.25, 0.95])
    np.testing.assert_allclose(curve.get_ydata(), [0.4, 0.8])
    assert (curve.get_color(), curve.get_marker()) == (PALETTE["vertebrae"], "o")
    # 10 pixels are 0.15 off, 30 the other way.
    assert vertebrae.get_title() == "vertebrae: calibration error 0.150"
    assert canal.get_title() == "canal: no probabilities"
    assert [len(axis.lines) for axis in (canal, disc)] == [1, 2]
    bars = [(bar.get_x(), round(bar.get_width(), 6), bar.get_height()) for bar in pixels[0].patches]
    assert bars == [(0.2, 0.1, 10), (0.9, 0.1, 30)]
    assert pixels[0].get_yscale() == "log"


@pytest.fixture
def measured():
    """A scan of 3 slices, 8 rows, 10 columns, with a disc and its canal; chords by hand, in its middle slice."""
    array = np.zeros((3, 8, 10), np.uint8)
    array[:, 3:5, 1:6], array[:, :, 7:9] = 201, 100
    instances = LabelMap(array, (1.0, 2.0, 4.0), (5.0, 6.0, 7.0), SAGITTAL_AXES[::-1].T)
    image = Volume(np.arange(240.0).reshape(3, 8, 10), instances.spacing_mm, instances.origin_mm, instances.direction)

    def chord(quantity, value, *ends):
        return Measurement(
            "disc", 1, quantity, value, "mm", tuple(tuple(instances.physical_point(e)) for e in ends), ""
        )

    lines = [tuple(tuple(instances.physical_point((x, row, 1))) for x in (1, 6)) for row in (0, 6)]
    return image, instances, [
        chord("height_middle", 4.04, (3, 4.5, 1), (3, 2.5, 1)),
        chord("depth", 5.0, (0.5, 3.5, 1), (5.5, 3.5, 1)),
        chord("canal_ap", 2.0, (6.5, 3.5, 1.2), (8.5, 3.5, 1.2)),
        Measurement("disc", 2, "depth", np.nan, "mm", (), "cut by the image's edge"),
        Measurement("spine", None, "lordosis", 33.33, "degrees", tuple(lines), "L3 to L5"),
    ]  # fmt: skip


def test_chords_lie_in_the_slice_they_were_taken_in_with_their_values_beside(measured):
    image, instances, found = measured
    (axis,) = measurement_figure(image, instances, found).axes
    np.testing.assert_array_equal(axis.images[0].get_array(), image.array[1])
    assert axis.get_aspect() == 2.0
    drawn = [np.stack(line.get_data(), axis=1).round(6).tolist() for line in axis.lines]
    assert drawn == [
        [[3, 4.5], [3, 2.5]], [[0.5, 3.5], [5.5, 3.5]], [[6.5, 3.5], [8.5, 3.5]], [[1, 0], [6, 0]], [[1, 6], [6, 6]],
    ]  # fmt: skip
    assert [line.get_linestyle() for line in axis.lines] == ["-", "--", ":", "-.", "-."]
    assert [text.get_text() for text in axis.texts] == ["disc 1:  4.0  |  5.0", "2.0"]
    assert axis.texts[0].get_position()[1] == pytest.approx(3.5)
    title = axis.get_title("left")
    assert title.startswith("lordosis 33.3°: L3 to L5\n") and title.endswith("not measured: 1")
    outlines = {to_rgb(c.get_edgecolor()[0]) for c in axis.collections}
    assert outlines == {to_rgb(PALETTE["IVD"]), to_rgb(PALETTE["canal"])}


def test_with_nothing_measured_the_slice_with_most_labels_is_shown(measured):
    image, instances, _ = measured
    array = instances.array.copy()
    array[2, :, :] = 100
    (axis,) = measurement_figure(image, instances.with_array(array), []).axes
    np.testing.assert_array_equal(axis.images[0].get_array(), image.array[2])
    with pytest.raises(ValueError, match=r"an image of \(10, 8, 3\) voxels and labels of \(10, 8, 2\); expected one"):
        small = LabelMap(array[:2], instances.spacing_mm, instances.origin_mm, instances.direction)
        measurement_figure(image, small, [])


def test_slices_stand_side_by_side_equally_bright_with_classes_and_notes(measured):
    image, instances, _ = measured
    classes = instances.with_array((instances.array > 0).astype(np.uint8) * 3)
    figure = slices_figure(image, classes, [2, 0], ["low", ""])
    last, first = figure.axes
    np.testing.assert_array_equal(last.images[0].get_array(), image.array[2])
    np.testing.assert_array_equal(first.images[0].get_array(), image.array[0])
    assert last.images[0].get_clim() == first.images[0].get_clim()
    assert last.get_aspect() == 2.0
    np.testing.assert_allclose(last.images[1].get_array()[3, 1, :3], to_rgb(PALETTE["IVD"]))
    assert last.get_title("left") == "sagittal slice 3 of 3\nlow"
    assert first.get_title("left") == "sagittal slice 1 of 3"


def test_a_preview_shows_the_quarters_of_what_was_found(make_volume):
    image = make_volume((12, 3, 4))
    found = make_volume((12, 3, 4), kind=LabelMap, dtype=np.uint8, values=np.zeros((12, 3, 4)))
    found.array[2:11] = 1  # slices 2 to 10: a quarter is 4, the half 6, three quarters 8
    titles = [axis.get_title("left") for axis in preview_figure(image, found).axes]
    assert titles == [f"sagittal slice {number} of 12" for number in (5, 7, 9)]


def test_a_split_has_a_row_for_each_patient_and_a_cell_for_each_slice():
    rows = [
        ("b", "b_t1", 0, "test"),
        ("b", "b_t2", 0, "train"),
        ("b", "b_t2", 1, "validation"),
        ("a", "a_t1", 0, "train"),
    ]
    split = pd.DataFrame(rows, columns=["patient", "series", "slice", "side"])
    # The paper's split: a slice that validates tests as well.
    both = pd.concat([split, split.iloc[:1].assign(side="validation")])
    for axis in split_figure({"one": split, "two": both}).axes:
        cells = axis.images[0].get_array()
        assert cells.filled(-1).tolist() == [[0, -1, -1], [2, 0, 1]]
        assert [axis.images[0].cmap(place)[0] for place in range(3)] == pytest.approx([0.85, 0.5, 0])
    figure = split_figure({"one": split})
    assert figure.axes[0].get_title() == "one"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(SIDE_GREYS)


def test_figures_become_the_same_png_without_a_warning(history, by_case, comparison, reliability, measured):
    # One epoch is what a model that is not trained by gradient has.
    draw = [
        lambda: training_curves(history.iloc[:1]),
        lambda: case_distribution(by_case, ("dice",)),
        lambda: comparison_figure(comparison),
        lambda: confusion_figure(np.diag([8, 2, 5, 0])),
        lambda: measurement_figure(*measured),
        lambda: reliability_figure(reliability),
        lambda: reliability_figure(reliability_table(np.zeros((3, BINS, 3)))),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in draw:
            first, second = png(figure(), dpi=40), png(figure(), dpi=40)
            assert first.startswith(b"\x89PNG\r\n\x1a\n")
            assert first == second
            assert b"Matplotlib" not in first
    width, height = struct.unpack(">II", png(training_curves(history), dpi=100)[16:24])
    assert (width, height) == (1100, 340)
