"""Intervals and tests against figures worked out by hand, and against slow ways that share no code with them."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumbarflow.labels import CLASSES
from lumbarflow.metrics import MEAN_FOREGROUND, class_scores
from lumbarflow.statistics import holm, paired_wilcoxon, patient_bootstrap, pooled_bootstrap

NAN = float("nan")


def cases(rows, metrics=("dice",)) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["class", "patient", *metrics])


# --- intervals of means -----------------------------------------------------------------------------------------------


def test_the_mean_is_over_cases_and_every_count_stands_beside_it():
    values = cases(
        [
            ("canal", "a", 0.2, 1.0),
            ("canal", "a", 0.4, NAN),
            ("canal", "b", 0.9, 4.0),
            ("IVD", "a", NAN, 2.0),
            ("IVD", "b", 0.5, NAN),
        ],
        ("dice", "asd_mm"),
    )
    table = patient_bootstrap(values, ["dice", "asd_mm"], seed=1)
    assert table.columns.tolist() == ["class", "metric", "mean", "low", "high", "n_cases", "n_patients", "n_undefined"]
    rows = table.set_index(["class", "metric"])
    assert rows.index.tolist() == [("canal", "dice"), ("canal", "asd_mm"), ("IVD", "dice"), ("IVD", "asd_mm")]
    assert rows["mean"].tolist() == pytest.approx([0.5, 2.5, 0.5, 2.0])
    assert rows[["n_cases", "n_patients", "n_undefined"]].to_numpy().tolist() == [
        [3, 2, 0], [2, 2, 1], [1, 1, 1], [1, 1, 1],
    ]  # fmt: skip


def test_two_patients_have_three_possible_draws():
    # a twice: 0.3; a and b: (0.2 + 0.4 + 0.9) / 3 = 0.5; b twice: 0.9; with the chances 1/4, 1/2, 1/4.
    values = cases([("canal", "a", 0.2), ("canal", "a", 0.4), ("canal", "b", 0.9)])
    ends = {
        level: patient_bootstrap(values, ["dice"], seed=3, samples=4000, level=level)[["low", "high"]].iloc[0].tolist()
        for level in (0.9, 0.6, 0.4)
    }
    assert ends[0.9] == ends[0.6] == pytest.approx([0.3, 0.9])
    assert ends[0.4] == pytest.approx([0.5, 0.5])


def test_all_cases_of_a_patient_are_drawn_together():
    # 50 cases of each patient agree; drawn case by case, the interval would be a tenth as wide.
    values = cases([("canal", patient, float(i)) for i, patient in enumerate("abcdefgh") for _ in range(50)])
    many = patient_bootstrap(values, ["dice"], seed=5)
    one = patient_bootstrap(values.drop_duplicates(), ["dice"], seed=5)
    assert many.loc[0, ["mean", "low", "high"]].tolist() == pytest.approx(one.loc[0, ["mean", "low", "high"]].tolist())
    assert many.loc[0, "high"] - many.loc[0, "low"] > 2


def test_the_interval_is_that_of_draws_made_one_by_one():
    generator = np.random.default_rng(11)
    patients = generator.integers(9, size=40)
    figures = np.where(generator.random(40) < 0.2, NAN, generator.random(40))
    low, high = patient_bootstrap(
        pd.DataFrame({"class": "IVD", "patient": patients, "dice": figures}), ["dice"], seed=2, samples=20000
    ).loc[0, ["low", "high"]]
    present = [figures[patients == patient] for patient in np.unique(patients)]
    means = [
        np.nanmean(np.concatenate([present[i] for i in generator.integers(len(present), size=len(present))]))
        for _ in range(5000)
    ]
    assert [low, high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)


def test_the_interval_of_a_mean_is_near_the_one_of_theory():
    figures = np.random.default_rng(0).normal(10, 3, 400)
    row = patient_bootstrap(
        pd.DataFrame({"class": "IVD", "patient": range(400), "dice": figures}), ["dice"], seed=4
    ).iloc[0]
    error = figures.std() / np.sqrt(400)
    assert [row["low"], row["high"]] == pytest.approx(figures.mean() + 1.96 * error * np.array([-1, 1]), abs=0.03)


def test_a_single_patient_has_a_mean_and_no_interval():
    row = patient_bootstrap(cases([("canal", "a", 0.2), ("canal", "a", 0.4), ("canal", "b", NAN)]), ["dice"], seed=1)
    assert row.loc[0, ["mean", "n_cases", "n_patients", "n_undefined"]].tolist() == [pytest.approx(0.3), 2, 1, 1]
    assert row.loc[0, ["low", "high"]].isna().all()


def test_a_group_without_any_figure_stays_in_the_table():
    row = patient_bootstrap(cases([("canal", "a", NAN), ("canal", "b", NAN)]), ["dice"], seed=1).iloc[0]
    assert row[["mean", "low", "high"]].isna().all()
    assert row[["n_cases", "n_patients", "n_undefined"]].tolist() == [0, 0, 2]


def test_patients_without_a_figure_are_not_drawn():
    # Were they drawn, some draws would have no figure, and the others fewer.
    values = cases([("canal", "a", 0.2), ("canal", "b", 0.9), ("canal", "c", 0.4)])
    more = pd.concat([values, cases([("canal", name, NAN) for name in "defgh"])])
    figures = ["mean", "low", "high", "n_cases", "n_patients"]
    one, other = (patient_bootstrap(table, ["dice"], seed=1).loc[0, figures].tolist() for table in (values, more))
    assert one == other


@given(st.permutations(range(12)), st.sampled_from([["dice", "iou"], ["iou"]]))
def test_neither_the_order_of_rows_nor_the_other_rows_matter(order, columns):
    generator = np.random.default_rng(7)
    values = pd.DataFrame(
        {
            "class": ["canal", "IVD"] * 6,
            "patient": list("aabbccddeeff"),
            "dice": generator.random(12),
            "iou": np.where(np.arange(12) % 5, generator.random(12), NAN),
        }
    )
    table = patient_bootstrap(values.iloc[order], columns, seed=9, samples=50).set_index(["class", "metric"])
    alone = patient_bootstrap(values[values["class"] == "IVD"], ["iou"], seed=9, samples=50).iloc[0]
    assert table.loc[("IVD", "iou")].tolist() == pytest.approx(alone.iloc[2:].tolist())


def test_groups_may_have_several_names():
    values = cases([("canal", "a", 0.2), ("canal", "b", 0.4)]).assign(model=["u", "u"])
    table = patient_bootstrap(values, ["dice"], by=["model", "class"], seed=1)
    assert table.loc[0, ["model", "class", "metric"]].tolist() == ["u", "canal", "dice"]


def test_one_seed_one_interval():
    values = cases([("canal", name, float(i)) for i, name in enumerate("abcdefghij")])
    tables = [patient_bootstrap(values, ["dice"], seed=seed, samples=37) for seed in (1, 1, 2)]
    assert tables[0].equals(tables[1]) and not tables[0].equals(tables[2])


# --- intervals of pooled figures --------------------------------------------------------------------------------------


def confusion(hits: int, misses: int) -> np.ndarray:
    """Every foreground class has `hits` voxels found and `misses` called background."""
    matrix = np.diag([1000, hits, hits, hits])
    matrix[1:, 0] = misses
    return matrix


def test_pooled_intervals_of_two_patients_by_hand():
    # Dice: a alone 2*10/(2*10+10) = 2/3; b alone 2*90/(2*90+10) = 18/19; both 2*100/(2*100+20) = 10/11.
    table = pooled_bootstrap({"a": confusion(10, 10), "b": confusion(90, 10)}, seed=1, samples=1000)
    assert table.columns.tolist() == ["class", "metric", "value", "low", "high", "n_patients", "n_undefined_draws"]
    assert table["class"].tolist() == [*CLASSES, MEAN_FOREGROUND] and set(table["metric"]) == {"dice"}
    for row in table.iloc[1:].itertuples():
        assert [row.value, row.low, row.high] == pytest.approx([10 / 11, 2 / 3, 18 / 19])
        assert (row.n_patients, row.n_undefined_draws) == (2, 0)
    # Background: 2*2000/(2*2000+60) of both, 2*1000/(2*1000+30) of either twice.
    assert table.loc[0, ["value", "low", "high"]].tolist() == pytest.approx([4000 / 4060, 2000 / 2030, 4000 / 4060])


def test_pooled_draws_are_those_of_single_voxels_counted_again():
    generator = np.random.default_rng(3)
    matrices = {f"p{i}": generator.integers(1, 60, (4, 4)) for i in range(7)}
    table = pooled_bootstrap(matrices, ["dice", "recall"], seed=4, samples=8000).set_index(["metric", "class"])
    stacked = np.stack(list(matrices.values()))
    drawn = [class_scores(stacked[generator.integers(7, size=7)].sum(axis=0)) for _ in range(4000)]
    for metric in ("dice", "recall"):
        scores = np.stack([scores[metric] for scores in drawn])
        for name, column in {"IVD": scores[:, 3], MEAN_FOREGROUND: scores[:, 1:].mean(axis=1)}.items():
            row = table.loc[(metric, name)]
            assert [row.low, row.high] == pytest.approx(np.quantile(column, [0.025, 0.975]), abs=0.008)


def test_draws_that_lack_a_class_are_left_out_and_counted():
    without = confusion(10, 10)
    without[3] = 0  # neither side has discs in patient a: a quarter of the draws take a twice
    table = pooled_bootstrap({"a": without, "b": confusion(90, 10)}, seed=1, samples=2000).set_index("class")
    assert table.loc["canal", "n_undefined_draws"] == 0
    for name in ("IVD", MEAN_FOREGROUND):
        assert 440 < table.loc[name, "n_undefined_draws"] < 560
    assert table.loc["IVD", ["value", "low", "high"]].tolist() == pytest.approx([18 / 19] * 3)


def test_a_class_that_nobody_has_keeps_its_row():
    matrix = np.diag([5, 5, 5, 0])
    table = pooled_bootstrap({"a": matrix, "b": 2 * matrix}, seed=1, samples=20).set_index("class")
    assert table.loc["IVD", ["value", "low", "high"]].isna().all()
    assert table.loc["IVD", "n_undefined_draws"] == table.loc[MEAN_FOREGROUND, "n_undefined_draws"] == 20


def test_a_single_patient_has_pooled_figures_and_no_intervals():
    table = pooled_bootstrap({"a": confusion(10, 10)}, seed=1, samples=20)
    assert table["value"].iloc[-1] == pytest.approx(2 / 3)
    assert table[["low", "high"]].isna().all(axis=None)


# --- paired tests -----------------------------------------------------------------------------------------------------


def compare(differences, others=(), metric="dice") -> pd.DataFrame:
    """One row per patient of the model "ours" at 0.5 and of "atlas" that much above it."""
    rows = [("ours", "canal", f"p{i}", 0.5) for i in range(len(differences))]
    rows += [("atlas", "canal", f"p{i}", 0.5 + difference) for i, difference in enumerate(differences)]
    return pd.DataFrame([*rows, *others], columns=["model", "class", "patient", metric])


def by_enumeration(differences) -> float:
    """Two-sided p of the signed-rank test: all signs that the differences could have had, counted one by one."""
    sizes = np.abs(differences)
    ranks = [np.sum(sizes < size) + (np.sum(sizes == size) + 1) / 2 for size in sizes]
    observed = sum(rank for rank, difference in zip(ranks, differences, strict=True) if difference > 0)
    sums = [sum(itertools.compress(ranks, signs)) for signs in itertools.product([0, 1], repeat=len(ranks))]
    fewer, more = np.mean([value <= observed for value in sums]), np.mean([value >= observed for value in sums])
    return min(1.0, 2 * min(fewer, more))


def test_six_patients_who_all_gain_reach_the_smallest_p_there_is():
    row = paired_wilcoxon(compare([-0.3, -0.1, -0.2, -0.25, -0.05, -0.15]), "ours", "dice").iloc[0]
    assert row[["model", "class", "n_patients", "n_unpaired"]].tolist() == ["atlas", "canal", 6, 0]
    assert row["median_difference"] == pytest.approx(-0.175)
    assert row["statistic"] == 0
    assert row["p"] == row["p_smallest"] == row["p_holm"] == 0.03125


def test_ranks_by_hand():
    # Ranks of |1, 2, 3, -4, 5|: the negative one has rank 4 of 15. Rank sums <= 4 arise from {}, 1, 2, 3, 4, 1+2, 1+3:
    # 7 of 32 outcomes, on two sides 14 of 32.
    row = paired_wilcoxon(compare([1, 2, 3, -4, 5]), "ours", "dice").iloc[0]
    assert (row["statistic"], row["p"], row["p_smallest"]) == (4, pytest.approx(14 / 32), 2 / 32)
    assert row["median_difference"] == 2


@given(st.lists(st.integers(-4, 4).filter(bool), min_size=1, max_size=9))
def test_small_tests_are_exact_also_with_ties(eighths):
    differences = [value / 8 for value in eighths]
    row = paired_wilcoxon(compare(differences), "ours", "dice").iloc[0]
    assert row["p"] == pytest.approx(by_enumeration(differences))
    assert row["p"] >= row["p_smallest"] == min(1, 2 ** (1 - len(differences)))


def test_patients_without_difference_do_not_rank_but_count():
    row = paired_wilcoxon(compare([1, 0, 2, 3, 0, -4, 5]), "ours", "dice").iloc[0]
    assert (row["n_patients"], row["p"], row["p_smallest"]) == (7, pytest.approx(14 / 32), 2 / 32)
    assert row["median_difference"] == pytest.approx(1)


def test_equal_models_have_p_1():
    row = paired_wilcoxon(compare([0, 0, 0]), "ours", "dice").iloc[0]
    assert row[["n_patients", "median_difference", "p", "p_smallest", "p_holm"]].tolist() == [3, 0, 1, 1, 1]


def test_a_patient_counts_once_with_the_mean_of_its_cases():
    values = pd.DataFrame(
        [
            ("ours", "IVD", "a", 0.8), ("ours", "IVD", "a", 0.6), ("ours", "IVD", "a", NAN), ("ours", "IVD", "b", 0.5),
            ("net", "IVD", "a", 0.1), ("net", "IVD", "a", 0.5), ("net", "IVD", "a", 0.3), ("net", "IVD", "b", 0.3),
        ],
        columns=["model", "class", "patient", "dice"],
    )  # fmt: skip
    row = paired_wilcoxon(values, "ours", "dice").iloc[0]
    assert row["n_patients"] == 2 and row["p"] == row["p_smallest"] == 0.5
    assert row["median_difference"] == pytest.approx((-0.4 - 0.2) / 2)


def test_patients_without_a_figure_on_both_sides_are_counted_as_unpaired():
    others = [
        ("ours", "canal", "only ours", 0.5),
        ("atlas", "canal", "undefined", 0.5),
        ("ours", "canal", "undefined", NAN),
        ("ours", "IVD", "p0", 0.5),
        ("atlas", "IVD", "p0", NAN),
    ]
    table = paired_wilcoxon(compare([1, 2, 3], others), "ours", "dice").set_index("class")
    assert table.loc["canal", ["n_patients", "n_unpaired"]].tolist() == [3, 2]
    assert table.loc["IVD", ["n_patients", "n_unpaired"]].tolist() == [0, 1]
    assert table.loc["IVD", ["median_difference", "statistic", "p", "p_smallest", "p_holm"]].isna().all()
    # What could not be tested does not make the correction harder.
    assert table.loc["canal", "p_holm"] == table.loc["canal", "p"] == 0.25


def test_holm_is_over_every_model_and_class_of_the_table():
    rows = []
    for patient in range(6):
        for model, canal, disc in [("ours", 0, 0), ("net", 1, -1), ("atlas", 2, (-1) ** patient)]:
            rows += [(model, "canal", patient, canal * (patient + 1)), (model, "IVD", patient, disc * (patient + 1))]
    table = paired_wilcoxon(pd.DataFrame(rows, columns=["model", "class", "patient", "asd_mm"]), "ours", "asd_mm")
    assert table[["model", "class"]].to_numpy().tolist() == [
        ["net", "canal"], ["net", "IVD"], ["atlas", "canal"], ["atlas", "IVD"],
    ]  # fmt: skip
    # 1/32 three times out of four tests: 4/32 each; the fourth stands as it is.
    assert table["p_holm"].tolist() == pytest.approx([0.125] * 3 + [table["p"].iloc[3]])


def test_many_patients_use_the_normal_approximation():
    # 60 differences 1..60, those at the odd numbers negative: W- = 900, mean 915, variance 60*61*121/24.
    row = paired_wilcoxon(compare([i if i % 2 == 0 else -i for i in range(1, 61)]), "ours", "dice").iloc[0]
    from statistics import NormalDist

    assert row["statistic"] == 900
    assert row["p"] == pytest.approx(2 * NormalDist().cdf(-(15 - 0.5) / (60 * 61 * 121 / 24) ** 0.5))


# --- Holm -------------------------------------------------------------------------------------------------------------


def test_holm_by_hand():
    # Sorted .01 .03 .04 of three: 3 * .01 = .03, 2 * .03 = .06, and .04 may not fall below its predecessor.
    assert holm([0.04, 0.01, 0.03]).tolist() == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.7]).tolist() == [1, 1]
    assert holm([0.2]).tolist() == [0.2]
    assert holm([]).tolist() == []


def test_holm_does_not_count_what_was_not_tested():
    np.testing.assert_allclose(holm([NAN, 0.01, NAN, 0.04]), [NAN, 0.02, NAN, 0.04])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 1))
def test_holm_rejects_what_its_steps_reject(p, level):
    rejected = [False] * len(p)
    for step, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if p[index] * (len(p) - step) > level:
            break
        rejected[index] = True
    assert (holm(p) <= level).tolist() == rejected or level == 1


# --- errors -----------------------------------------------------------------------------------------------------------

VALUES = cases([("canal", "a", 0.2), ("canal", "b", 0.4)])


def test_a_table_without_its_columns_is_an_error():
    with pytest.raises(ValueError, match=r"without \['patient'\]; expected them beside \['class', 'dice'\]"):
        patient_bootstrap(VALUES.drop(columns="patient"), ["dice"], seed=1)
    with pytest.raises(ValueError, match=r"without \['model', 'asd_mm'\]"):
        paired_wilcoxon(VALUES, "ours", "asd_mm")


@pytest.mark.parametrize("column", ["class", "patient"])
def test_a_row_without_group_or_patient_is_an_error(column):
    # Grouping would drop it without a word.
    with pytest.raises(ValueError, match=rf"1 rows without '{column}'; expected one in each"):
        patient_bootstrap(VALUES.assign(**{column: ["a", None]}), ["dice"], seed=1)


def test_infinite_figures_are_an_error():
    with pytest.raises(ValueError, match=r"1 infinite figures in \['dice'\]; expected finite ones"):
        patient_bootstrap(VALUES.assign(dice=[np.inf, 1]), ["dice"], seed=1)


@pytest.mark.parametrize(("samples", "level"), [(0, 0.95), (10, 95), (10, 0), (10, 1)])
def test_draws_out_of_range_are_an_error(samples, level):
    for function, arguments in [(patient_bootstrap, (VALUES, ["dice"])), (pooled_bootstrap, ({"a": confusion(1, 1)},))]:
        with pytest.raises(ValueError, match=rf"{samples} samples at level {level:g}; expected at least 1 at a level"):
            function(*arguments, samples=samples, level=level, seed=1)


def test_no_patients_is_an_error():
    with pytest.raises(ValueError, match=r"confusion matrices of 0 patients; expected at least one"):
        pooled_bootstrap({}, seed=1)


@pytest.mark.parametrize(("models", "reference"), [(["ours", "ours"], "ours"), (["ours", "net"], "theirs")])
def test_a_comparison_needs_the_named_model_and_another(models, reference):
    with pytest.raises(ValueError, match=rf"the models \['ours'.*\]; expected '{reference}' and at least one other"):
        paired_wilcoxon(VALUES.assign(model=models), reference, "dice")


@pytest.mark.parametrize("wrong", [-0.1, 1.5])
def test_what_is_no_probability_is_an_error(wrong):
    with pytest.raises(ValueError, match=r"p-values from .* to .*; expected 0 to 1"):
        holm([0.5, wrong, NAN])
