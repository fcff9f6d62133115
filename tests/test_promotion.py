"""Promotion rules by hand and by property."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumbarflow.promotion import ModelFacts, decide_promotion

RULES = {"class_tolerance": 0.0625, "paired_test": {"alpha": 0.05}}


def cases(*dice, patients="xy"):
    """Facts of test cases with these mean Dice: each patient in turn has one, then each a second one."""
    return {(patients[i % len(patients)], f"series {i}"): value for i, value in enumerate(dice)}


CANDIDATE = ModelFacts(
    name="lumbar-unet",
    version="2",
    data_kind="real",
    leaky=False,
    data_hash="d" * 32,
    split_hash="s" * 32,
    mean_foreground_dice=0.9,
    class_dice={"vertebrae": 0.9375, "canal": 0.875, "IVD": 0.8875},
    case_dice=cases(0.9, 0.8),
    trained_on=frozenset({"a", "b", "c"}),
    tested_on=frozenset({"x", "y"}),
)
CHAMPION = replace(CANDIDATE, version="1")
BY_HAND = r'mlflow\.MlflowClient\(\)\.set_registered_model_alias\("lumbar-unet", "champion", "2"\)'


@pytest.mark.parametrize(
    ("candidate", "champion", "promote", "reason"),
    [
        ({}, None, True, r"^There was no champion; its mean foreground Dice is 0\.9000\.$"),
        (
            {},
            {},
            True,
            r"Dice of 0\.9000 is not lower than the 0\.9000 of version 1, on the same test patients, and no class is "
            r"lower by more than 0\.0625; a paired Wilcoxon test over 2 test patients sees no difference \(p = 1\)\.$",
        ),
        ({"mean_foreground_dice": 0.91}, {}, True, r"Dice of 0\.9100 is not lower than the 0\.9000 of version 1"),
        ({"data_kind": "synthetic"}, {"data_kind": "synthetic"}, True, r"not lower"),
        ({"data_kind": "synthetic"}, None, True, r"There was no champion"),
        ({"mean_foreground_dice": 0.89}, {}, False, r"Dice of 0\.8900 is lower than the 0\.9000 of the champion .*"),
        ({"mean_foreground_dice": 0.9 - 1e-7}, {}, False, r"0\.8999999 is lower than the 0\.9000000 of the champion"),
        ({"mean_foreground_dice": math.nextafter(0.9, 0)}, {}, False, r"is lower than"),
        ({"leaky": True}, None, False, r"split without regard to patients.*A leaky model never becomes champion"),
        ({"leaky": True, "mean_foreground_dice": 1.0}, {"leaky": True}, False, r"never becomes champion"),
        ({"leaky": None}, None, False, r"lacks a usable leaky\. Run the training and its evaluation again"),
        ({"mean_foreground_dice": math.nan}, None, False, r"lacks a usable mean_foreground_dice\."),
        ({"mean_foreground_dice": None}, {}, False, r"lacks a usable mean_foreground_dice\."),
        ({"mean_foreground_dice": math.inf}, {}, False, r"lacks a usable mean_foreground_dice\."),
        ({"data_hash": ""}, {"data_hash": ""}, False, r"lacks a usable data_hash\."),
        ({"data_kind": "other", "split_hash": None}, {}, False, r"lacks a usable data_kind, split_hash\."),
        ({"trained_on": frozenset()}, {}, False, r"lacks a usable trained_on\."),
        ({"tested_on": frozenset()}, {}, False, r"lacks a usable tested_on\."),
        ({"class_dice": {"vertebrae": 0.9, "IVD": 0.9}}, None, False, r"lacks a usable class_dice\."),
        ({"class_dice": {"vertebrae": 0.9, "canal": math.nan, "IVD": 0.9}}, None, False, r"usable class_dice\."),
        ({"case_dice": {}}, None, False, r"lacks a usable case_dice\."),
        ({"tested_on": frozenset("abx")}, None, False, r"trained on 2 of its own test patients\. Run preprocess"),
        ({}, {"data_hash": None}, False, rf"the champion \(version 1\), which lacks a usable data_hash\. .*{BY_HAND}"),
        ({}, {"mean_foreground_dice": math.nan}, False, r"version 1\), which lacks a usable mean_foreground_dice"),
        ({"data_kind": "synthetic"}, {}, False, rf"from synthetic scans and the champion .* real ones\. .*{BY_HAND}"),
        ({"data_kind": "mixed"}, {}, False, r"from mixed scans and the champion \(version 1\) from real ones"),
        (
            {"data_hash": "e" * 32},
            {"data_kind": "synthetic"},
            False,
            rf"other data \(real, hash e{{8}}\) than the champion \(version 1\) \(synthetic, hash d{{8}}\).*{BY_HAND}",
        ),
        # Registered before cases were: the safer way is a person's decision.
        ({}, {"case_dice": {}}, False, rf"the champion \(version 1\), which lacks a usable case_dice\. .*{BY_HAND}"),
        (
            {},
            {"case_dice": cases(0.9, 0.8, 0.7)},
            False,
            r"1 test cases are not both its own and those of the champion",
        ),
        ({}, {"case_dice": cases(0.9, 0.8, patients="xz")}, False, rf"2 test cases are not both .*{BY_HAND}"),
        ({"rolled_back": "1"}, None, False, rf"net is the one of version 1, which was rolled back\. .*{BY_HAND}"),
        ({"rolled_back": "0"}, {}, False, rf"net is the one of version 0, which was rolled back\. .*{BY_HAND}"),
        # Somebody has put it back by hand.
        ({"rolled_back": "1"}, {}, True, r"not lower"),
        ({"split_hash": "t" * 32}, {}, False, rf"another split \(hash t{{8}}\) .* \(hash s{{8}}\).*{BY_HAND}"),
        ({}, {"trained_on": frozenset("axy")}, False, rf"trained on 2 of these test patients\. .*{BY_HAND}"),
    ],
)
def test_decision(candidate, champion, promote, reason):
    decision = decide_promotion(
        replace(CANDIDATE, **candidate), None if champion is None else replace(CHAMPION, **champion), "champion", RULES
    )
    assert decision.promote is promote
    assert re.search(reason, decision.reason), decision.reason


@pytest.mark.parametrize(
    ("canal", "tolerance", "promote", "reason"),
    [
        (0.8125, 0.0625, True, r"no class is lower by more than 0\.0625; "),  # at the tolerance
        (
            0.8124,
            0.0625,
            False,
            rf"Dice of canal, 0\.8124, is lower than the 0\.8750 of .* 0\.0625 allowed\. .*{BY_HAND}",
        ),
        (0.8750, 0.0, True, r"no class is lower by more than 0; "),
        (math.nextafter(0.875, 0), 0.0, False, r"Dice of canal, 0\.87499\d+, is lower than the 0\.87500\d+ of"),
    ],
)
def test_no_class_may_be_worse_by_more_than_the_tolerance(canal, tolerance, promote, reason):
    # The mean is no lower: what one class loses another has gained.
    candidate = replace(CANDIDATE, class_dice=CANDIDATE.class_dice | {"canal": canal, "IVD": 0.96})
    decision = decide_promotion(candidate, CHAMPION, "champion", RULES | {"class_tolerance": tolerance})
    assert decision.promote is promote
    assert re.search(reason, decision.reason), decision.reason


# The exact two-sided p of n differences: 2 / 2^n if all have one sign, 4 / 2^n if the smallest has the other one, and
# 10 / 2^n if the smallest two have (subsets of 1..n with a sum of at most 3: none, 1, 2, 3, 1 + 2; each way).
@pytest.mark.parametrize(
    ("differences", "alpha", "promote", "reason"),
    [
        ([-1, -2, -3, -4, -5, -6], 0.05, False, r"test over 6 test patients has p = 0\.031, below 0\.05\. .*by_hand"),
        ([-1, -2, -3, -4, -5, -6], 0.03125, True, r"6: p = 0\.031, at best 0\.031; 0\.03125 is asked for"),
        (
            [1, -2, -3, -4, -5, -6],
            0.05,
            True,
            r"over 6 test patients does not show it worse \(p = 0\.062, its ranks low",
        ),
        ([1, 2, 3, 4, 5, 6], 0.05, True, r"does not show it worse \(p = 0\.031, its ranks not lower\)\.$"),
        ([1, -2, -3, -4, -5, -6, -7], 0.05, False, r"over 7 test patients has p = 0\.031, below 0\.05"),
        (
            [1, 2, -3, -4, -5, -6, -7],
            0.05,
            True,
            r"7 test patients does not show it worse \(p = 0\.078, its ranks lower",
        ),
        ([-1, -2, -3, -4, -5], 0.05, True, r"could not have shown it worse, .* \(5: p = 0\.062, at best 0\.062; 0\.05"),
        (
            [0, 0, -1, -2],
            0.05,
            True,
            r"over 4 test patients could not have shown it worse, .* \(2: p = 0\.5, at best 0\.5",
        ),
        ([-1, -2, -3, -4, -5, -6], 0, True, r"has p = 0\.031, its ranks lower, and is switched off\.$"),
        ([math.nan, math.nan], 0.05, True, r"no test patient has a figure of both, so no paired test was made\.$"),
        # Patients without a difference count neither way.
        ([0, 0, 0, -1, -2, -3, -4, -5, -6], 0.05, False, r"over 9 test patients has p = 0\.031, below 0\.05"),
        # By ranks: one patient who gains more than all others lose does not make up for them. 70 of the 4096 subsets of
        # 1..12 have a sum of at most 12.
        ([-1, -2, -3, -4, -5, -6, -7, -8, -9, -10, -11, 1000], 0.05, False, r"12 test patients has p = 0\.034, below"),
    ],
)
def test_a_paired_test_over_the_cases(differences, alpha, promote, reason):
    patients = "ABCDEFGHIJKL"[: len(differences)]
    ours = cases(*(0.5 + difference / 4096 for difference in differences), patients=patients)
    theirs = cases(*([0.5] * len(differences)), patients=patients)
    candidate, champion = replace(CANDIDATE, case_dice=ours), replace(CHAMPION, case_dice=theirs)
    decision = decide_promotion(candidate, champion, "champion", RULES | {"paired_test": {"alpha": alpha}})
    assert decision.promote is promote
    assert re.search(reason.replace("by_hand", BY_HAND), decision.reason), decision.reason


def test_a_patient_counts_once_however_many_cases_it_has():
    # 6 patients with two series each: by series 12 differences, all lower but 4, by patient 4 of them level.
    ours = cases(*[0.25] * 6, *[0.75] * 4, 0.25, 0.25, patients="ABCDEF")
    theirs = cases(*[0.5] * 12, patients="ABCDEF")
    candidate, champion = replace(CANDIDATE, case_dice=ours), replace(CHAMPION, case_dice=theirs)
    decision = decide_promotion(candidate, champion, "champion", RULES)
    assert decision.promote
    assert "over 6 test patients could not have shown it worse, so few of them differ (2: p = 0.5" in decision.reason


def test_a_version_without_facts_lacks_all_of_them():
    facts = (
        "data_kind, leaky, data_hash, split_hash, mean_foreground_dice, class_dice, case_dice, trained_on, tested_on"
    )
    decision = decide_promotion(CANDIDATE, ModelFacts("lumbar-unet", "1"), "champion", RULES)
    assert not decision.promote
    assert f"which lacks a usable {facts}." in decision.reason


def facts(version):
    patients = st.frozensets(st.sampled_from("abcxyz"), max_size=3)
    dice = st.one_of(st.sampled_from([0.8, 0.9]), st.floats(0, 1))
    classes = st.fixed_dictionaries({name: dice for name in ("vertebrae", "canal", "IVD")})
    shared = st.lists(dice, min_size=6, max_size=6).map(lambda dice: cases(*dice, patients="xyzuvw"))
    return st.builds(
        ModelFacts,
        name=st.just("lumbar-unet"),
        version=st.just(version),
        data_kind=st.sampled_from(["real", "synthetic", "mixed", None]),
        leaky=st.sampled_from([False, False, False, True, None]),
        data_hash=st.sampled_from(["d", "e"]),
        split_hash=st.sampled_from(["s", "t"]),
        mean_foreground_dice=st.one_of(st.sampled_from([0.8, 0.9, math.nan, None]), st.floats(0, 1)),
        class_dice=st.one_of(classes, st.just({})),
        case_dice=st.one_of(shared, st.just({})),
        rolled_back=st.sampled_from([None, None, "1", "0"]),
        trained_on=st.one_of(st.none(), patients),
        tested_on=st.one_of(st.none(), patients),
    )


@given(candidate=facts("2"), champion=st.none() | facts("1"))
def test_whatever_gets_the_alias_has_earned_it(candidate, champion):
    decision = decide_promotion(candidate, champion, "champion", RULES)
    assert decision.reason.endswith(".")
    if not decision.promote:
        return
    assert candidate.leaky is False
    assert 0 <= candidate.mean_foreground_dice <= 1
    assert not candidate.trained_on & candidate.tested_on
    assert candidate.rolled_back in (None, champion and champion.version)
    if champion is not None:
        for name, dice in candidate.class_dice.items():
            assert dice >= champion.class_dice[name] - RULES["class_tolerance"]
        # Of 6 patients only all can be significantly worse, at p = 0.03125.
        assert any(dice >= champion.case_dice[case] for case, dice in candidate.case_dice.items())
        assert (candidate.data_hash, candidate.split_hash) == (champion.data_hash, champion.split_hash)
        assert candidate.mean_foreground_dice >= champion.mean_foreground_dice
        assert not champion.trained_on & candidate.tested_on
        assert candidate.data_kind == "real" or champion.data_kind != "real"


@given(candidate=facts("2"), dice=st.floats(0, 1))
def test_equal_models_follow_each_other(candidate, dice):
    # Whatever may become the first champion may replace an equal one.
    candidate = replace(candidate, mean_foreground_dice=dice, rolled_back=None)
    first = decide_promotion(candidate, None, "champion", RULES).promote
    assert decide_promotion(candidate, replace(candidate, version="1"), "champion", RULES).promote is first


@given(candidate=facts("2"), champion=facts("1"), tolerance=st.floats(0, 1), alpha=st.floats(0, 1))
def test_stricter_rules_promote_nothing_more(candidate, champion, tolerance, alpha):
    strict = {"class_tolerance": tolerance / 2, "paired_test": {"alpha": (1 + alpha) / 2}}
    lax = {"class_tolerance": tolerance, "paired_test": {"alpha": alpha}}
    if decide_promotion(candidate, champion, "champion", strict).promote:
        assert decide_promotion(candidate, champion, "champion", lax).promote
