from __future__ import annotations

import numpy as np
from matplotlib.colors import to_rgb

from lumbarflow.figures import Overlay, colour_labels, confusion_figure, overlay_figure
from lumbarflow.labels import CLASSES, PALETTE


def test_labels_take_the_palettes_colours_and_background_is_clear():
    colours = colour_labels(np.array([[0, 1], [2, 3]], np.uint8), opacity=0.5)
    assert colours.shape == (2, 2, 4)
    assert colours[0, 0].tolist() == [0, 0, 0, 0]
    for place, name in (((0, 1), "vertebrae"), ((1, 0), "canal"), ((1, 1), "IVD")):
        np.testing.assert_allclose(colours[place], [*to_rgb(PALETTE[name]), 0.5])


def test_overlays_show_each_case_in_its_aspect_with_what_was_missed_in_white():
    reference, prediction = np.zeros((6, 8), np.uint8), np.zeros((6, 8), np.uint8)
    reference[1, 1], prediction[2, 2] = 1, 3
    overlay = Overlay("worst: x", np.arange(48.0).reshape(6, 8), reference, prediction, (2.0, 1.0))
    figure = overlay_figure([overlay, overlay])
    rows = figure.axes
    assert len(rows) == 8
    assert rows[0].get_title("left").startswith("worst: x")
    assert all(axis.get_aspect() == 2.0 for axis in rows)
    errors = rows[3].images[1].get_array()
    assert errors[1, 1].tolist() == [1, 1, 1, 0.9]
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
