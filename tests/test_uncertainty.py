from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lumbarflow.uncertainty import (
    BINS,
    FLOOR,
    calibration_error,
    entropy,
    entropy_dice_correlation,
    entropy_sums,
    mean_entropy,
    reliability_counts,
    reliability_table,
)

SURE, TORN, LOST = [1, 0, 0, 0], [0, 0.5, 0.5, 0], [0.25, 0.25, 0.25, 0.25]


def softmax(seed: int, *shape: int, spread: float = 3) -> np.ndarray:
    """float32 (*shape, 4) of random probabilities."""
    shares = np.exp(spread * np.random.default_rng(seed).normal(size=(*shape, 4)))
    return (shares / shares.sum(axis=-1, keepdims=True)).astype(np.float32)


def test_entropy_by_hand():
    # ln 2 is half of ln 4.
    p = np.array([SURE, TORN, LOST], np.float32).T
    found = entropy(p)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [0, 0.5, 1], atol=1e-6)
    np.testing.assert_allclose(entropy(np.array([[0.5], [0.5]])), [1])
    # Weights of an interpolation add up to 1 but for rounding; entropy stays a share.
    assert entropy(np.float32([1.0000001, 0, 0, 0])) == 0
    assert entropy(np.float32([0.25000003] * 4)) == 1


@given(st.integers(0, 2**32 - 1), st.permutations(range(4)))
def test_entropy_is_a_share_and_does_not_depend_on_the_order_of_the_classes(seed, order):
    p = np.moveaxis(softmax(seed, 5, spread=30), -1, 0)
    found = entropy(p)
    assert found.min() >= 0 and found.max() <= 1
    np.testing.assert_allclose(entropy(p[list(order)]), found, atol=1e-6)


def test_entropy_is_summed_by_the_class_that_was_decided():
    decided = np.array([[[0, 1, 1]], [[3, 3, 1]]], np.uint8)
    p = np.array([[[LOST, TORN, SURE]], [[LOST, TORN, LOST]]], np.float32)
    sums = entropy_sums(decided, p)
    np.testing.assert_allclose(sums[0], [[0.5, 2], [0, 0], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(sums[1], [[1, 1], [0, 0], [1.5, 2]], atol=1e-6)
    # Pixels count, not slices: 1.5 over the three vertebral pixels of both.
    assert mean_entropy(sums) == pytest.approx({"vertebrae": 0.5, "canal": np.nan, "IVD": 0.75}, nan_ok=True)


def test_reliability_by_hand():
    #          left out   at an edge  the other two certain
    vertebra = [0.0099, 0.3, 1.0, 0.0]
    disc = [0.04, 0.35, 0.0, 1.0]
    p = np.array([[1 - v - d, v, 0, d] for v, d in zip(vertebra, disc, strict=True)], np.float32).reshape(1, 2, 2, 4)
    counts = reliability_counts(np.array([[[1, 3], [1, 0]]], np.uint8), p)
    assert counts.shape == (1, 3, BINS, 3)
    expected = np.zeros((3, BINS, 3))
    expected[0, 3] = 1, 0.3, 0
    expected[0, 9] = 1, 1, 1
    expected[2, 0] = 1, 0.04, 0
    expected[2, 3] = 1, 0.35, 1
    expected[2, 9] = 1, 1, 0
    np.testing.assert_allclose(counts[0], expected, atol=1e-6)

    table = reliability_table(counts[0])
    assert list(table) == ["class", "low", "high", "count", "confidence", "frequency"]
    assert len(table) == 3 * BINS
    discs = table[table["class"] == "IVD"].set_index("low")
    assert discs.loc[0.3].tolist()[1:] == pytest.approx([0.4, 1, 0.35, 1])
    assert discs.loc[FLOOR].tolist()[1:] == pytest.approx([0.1, 1, 0.04, 0])
    assert discs.loc[0.5, "count"] == 0 and discs.loc[0.5, ["confidence", "frequency"]].isna().all()
    # (0.3 + 0) / 2 and (0.04 + 0.65 + 1) / 3.
    errors = {"vertebrae": 0.15, "canal": np.nan, "IVD": 1.69 / 3}
    assert calibration_error(table) == pytest.approx(errors, nan_ok=True)


@given(
    hnp.arrays(np.uint8, (2, 3, 5), elements=st.integers(0, 3)), st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 9])
)
def test_every_pixel_at_or_above_the_floor_is_counted_once_for_each_class(reference, seed, spread):
    p = softmax(seed, *reference.shape, spread=spread)
    counts = reliability_counts(reference, p)
    for index in (1, 2, 3):
        of_class, counted = p[..., index], p[..., index] >= FLOOR
        found = counts[:, index - 1].sum(axis=1)
        np.testing.assert_array_equal(found[:, 0], counted.sum(axis=(1, 2)))
        np.testing.assert_allclose(found[:, 1], np.where(counted, of_class, 0).sum(axis=(1, 2)), rtol=1e-5)
        np.testing.assert_array_equal(found[:, 2], (counted & (reference == index)).sum(axis=(1, 2)))
    table = reliability_table(counts.sum(axis=0)).dropna()
    assert (table["confidence"].between(table["low"] - 1e-6, table["high"] + 1e-6)).all()


def drawn(p: np.ndarray, seed: int = 1) -> np.ndarray:
    """A reference that has each class as often as the probabilities say."""
    levels = np.random.default_rng(seed).random(p.shape[:-1])
    return np.minimum((levels[..., None] >= p.cumsum(axis=-1)).sum(axis=-1), 3).astype(np.uint8)


def errors(reference: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.array(list(calibration_error(reliability_table(reliability_counts(reference, p).sum(axis=0))).values()))


def test_a_net_that_is_right_as_often_as_it_says_has_no_calibration_error():
    p = softmax(0, 2, 200, 150)
    reference = drawn(p)
    assert errors(reference, p).max() < 0.01
    # Sharpened, the same net is too sure: of what it gives 0.9 it has fewer.
    sharp = p**3 / (p**3).sum(axis=-1, keepdims=True)
    assert errors(reference, sharp).min() > 0.1
    table = reliability_table(reliability_counts(reference, sharp).sum(axis=0))
    high, low = table[table["low"] >= 0.7], table[table["high"] <= 0.3]
    assert (high["frequency"] < high["confidence"]).all() and (low["frequency"] > low["confidence"]).all()


def test_what_is_left_out_does_not_make_a_calibrated_net_look_otherwise():
    # Most pixels are far from any structure; were they counted, the errors of the others would vanish among them.
    p = softmax(0, 1, 100, 90)
    sharp = p**3 / (p**3).sum(axis=-1, keepdims=True)
    far = np.zeros((1, 4000, 90, 4), np.float32) + np.array([0.997, 0.001, 0.001, 0.001], np.float32)
    reference = drawn(p)
    with_air = np.concatenate([reference, np.zeros((1, 4000, 90), np.uint8)], axis=1)
    np.testing.assert_array_equal(errors(with_air, np.concatenate([sharp, far], axis=1)), errors(reference, sharp))


def cases(entropies: list[float], dice: list[float], name: str = "canal") -> pd.DataFrame:
    return pd.DataFrame({"class": name, "entropy": entropies, "dice": dice})


def test_entropy_tells_bad_cases_by_rank():
    # Ranks 1, 2, 3, 4 against 3, 4, 1, 2: 1 - 6 * 16 / (4 * 15). A case without entropy is none.
    by_case = pd.concat(
        [
            cases([0.1, 0.2, 0.3, 0.9, np.nan], [0.8, 0.9, 0.1, 0.7, 0.0], "vertebrae"),
            cases([0.1, 0.2, 0.9], [0.9, 0.8, 0.1]),
            cases([0.1, 0.2, np.nan], [0.9, 0.8, 0.1], "IVD"),
        ]
    )
    found = entropy_dice_correlation(by_case)
    assert found == pytest.approx({"vertebrae": -0.6, "canal": -1, "IVD": np.nan}, nan_ok=True)
    # Ties share a rank; what is constant tells nothing.
    assert entropy_dice_correlation(cases([1, 1, 2], [3, 3, 1]))["canal"] == pytest.approx(-1)
    assert np.isnan(entropy_dice_correlation(cases([1, 1, 1], [3, 2, 1]))["canal"])


@pytest.mark.parametrize("count", [entropy_sums, reliability_counts])
def test_probabilities_of_other_pixels_are_an_error(count):
    with pytest.raises(ValueError, match=r"probabilities of shape \(1, 3, 2, 4\); expected \(1, 2, 3, 4\), one for"):
        count(np.zeros((1, 2, 3), np.uint8), np.zeros((1, 3, 2, 4), np.float32))
