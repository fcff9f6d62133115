"""Clipping and z-score by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumbarflow.intensity import ColumnNormalisation, Normalisation, normalisation_of


def test_z_score_of_a_whole_series():
    # 0 ... 4: mean 2, variance (4 + 1 + 0 + 1 + 4) / 5 = 2.
    series = np.array([[[4, 1]], [[0, 2]], [[3, 2]]], np.int16)[:, :, :]
    figures = Normalisation.of(np.arange(5, dtype=np.int16), (0, 100))
    assert figures.to_dict() == pytest.approx({"lower": 0, "upper": 4, "mean": 2, "std": math.sqrt(2)})
    normalised = figures.apply(series)
    assert normalised.dtype == np.float32 and normalised.shape == (3, 1, 2)
    np.testing.assert_allclose(normalised, (series - 2) / math.sqrt(2), rtol=1e-6)


def test_percentiles_clip_before_mean_and_deviation_are_taken():
    # Percentiles 25 and 75 of 0 ... 4 are 1 and 3; 1, 1, 2, 3, 3 has mean 2 and variance 4 / 5.
    figures = Normalisation.of(np.arange(5.0), (25, 75))
    assert figures == Normalisation(1.0, 3.0, pytest.approx(2.0), pytest.approx(math.sqrt(0.8)))
    np.testing.assert_allclose(figures.apply(np.array([-50, 2, 900])), np.array([-1, 0, 1]) / math.sqrt(0.8), rtol=1e-6)
    assert figures.outside == pytest.approx(-1 / math.sqrt(0.8))


def test_unsigned_intensities_do_not_wrap_around():
    series = np.array([0, 10, 200, 255], np.uint8)
    figures = Normalisation.of(series, (0, 100))
    np.testing.assert_allclose(figures.apply(series), (series - 116.25) / np.std(series), rtol=1e-5)


@given(
    st.sampled_from([np.uint8, np.int16, np.uint16, np.int32, np.float32]),
    st.lists(st.integers(0, 255), min_size=2, max_size=40).filter(lambda values: len(set(values)) > 1),
    st.sampled_from([(0, 100), (0.5, 99.5), (10, 90)]),
)
def test_figures_are_the_same_however_they_are_counted(dtype, values, percentiles):
    # The largest value of each type, too: differences of such must not overflow.
    most = 10**6 if dtype in (np.int32, np.float32) else np.iinfo(dtype).max
    series = np.array([0, *values, most]).astype(dtype)
    lower, upper = np.percentile(series.astype(np.float64), percentiles)
    clipped = np.clip(series.astype(np.float64), lower, upper)
    if lower < upper:
        found = Normalisation.of(series, percentiles)
        assert (found.lower, found.upper) == pytest.approx((lower, upper), rel=1e-6)
        assert (found.mean, found.std) == pytest.approx((clipped.mean(), clipped.std()), rel=1e-6)


def test_the_widest_range_of_signed_intensities():
    series = np.array([-32768, 32767, 32767, 32767], np.int16)
    figures = Normalisation.of(series, (0, 100))
    assert figures.to_dict() == pytest.approx({"lower": -32768, "upper": 32767, "mean": 16383.25, "std": 28377.487})


@given(st.integers(0, 2**32), st.floats(0.01, 100), st.floats(-1000, 1000))
def test_the_unit_of_the_scanner_does_not_matter(seed, scale, offset):
    series = np.random.default_rng(seed).gamma(2.0, size=(3, 5, 7))
    expected = Normalisation.of(series, (2, 98)).apply(series)
    moved = series * scale + offset
    np.testing.assert_allclose(Normalisation.of(moved, (2, 98)).apply(moved), expected, atol=0.01)
    assert abs(expected.mean()) < 1e-4 and expected.std() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_an_error(value):
    with pytest.raises(ValueError, match="aren't finite cannot be normalised; expected finite numbers"):
        Normalisation.of(np.array([1.0, value, 2.0]), (0, 100))


@pytest.mark.parametrize("percentiles", [(-1, 99), (0.5, 100.5), (99, 1), (50, 50), (math.nan, 99), (1,), (1, 50, 99)])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_percentiles_that_do_not_exist_are_named(percentiles, dtype):
    with pytest.raises(ValueError, match=r"preprocess\.percentiles is \[.*\]; expected two numbers from 0 to 100"):
        Normalisation.of(np.arange(100, dtype=dtype), percentiles)


def test_constant_intensities_are_an_error():
    series = np.full(1000, 7.0)
    series[0] = 9.0  # an outlier is no contrast
    with pytest.raises(ValueError, match=r"constant \(7\) between percentiles 0.5 and 99.5; expected .* contrast"):
        Normalisation.of(series, (0.5, 99.5))


# --- the paper's ------------------------------------------------------------------------------------------------------


def test_the_papers_greys_are_each_slices_own_and_cut_off():
    series = np.array([[[-1, 0], [1, 3]], [[10, 20], [50, 110]], [[7, 7], [7, 7]]], np.int16)
    greys = ColumnNormalisation.of(series, (0.5, 99.5)).apply(series)
    # 0, 1/4, 2/4 and 4/4 of 255 are 0, 63.75, 127.5 and 255; 1/10 and 4/10 of it 25.5 and 102; a constant slice is 0.
    expected = [[[0, 63], [127, 255]], [[0, 25], [102, 255]], [[0, 0], [0, 0]]]
    assert greys.dtype == np.float32
    np.testing.assert_array_equal(greys, expected)


def test_columns_get_length_one_and_empty_ones_stay_empty():
    slices = np.array([[[3, 0, 5], [4, 0, 12]]], np.float32)  # two rows, three columns
    finished = ColumnNormalisation().finish(slices)
    np.testing.assert_allclose(finished, [[[0.6, 0, 5 / 13], [0.8, 0, 12 / 13]]], rtol=1e-6)
    assert finished.dtype == np.float32
    assert ColumnNormalisation().outside == 0


def test_normalisations_are_chosen_by_name():
    series = np.arange(12.0).reshape(1, 3, 4)
    assert normalisation_of(series, "z_score", (0, 100)) == Normalisation.of(series, (0, 100))
    assert normalisation_of(series, "column_l2", (0, 100)) == ColumnNormalisation()
    with pytest.raises(ValueError, match=r"preprocess.normalisation is 'minmax'; expected one of z_score, column_l2"):
        normalisation_of(series, "minmax", (0, 100))
    with pytest.raises(ValueError, match="aren't finite"):
        normalisation_of(np.array([[[np.nan, 1.0]]]), "column_l2", (0, 100))


def test_the_z_score_leaves_nothing_to_do_at_the_nets_size():
    slices = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    assert Normalisation(0, 1, 0.5, 0.5).finish(slices) is slices
