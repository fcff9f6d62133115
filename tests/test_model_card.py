"""The model card: every fact where a reader looks for it, nothing that was not recorded, short enough to be shown."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumbarflow.labels import LabelTable
from lumbarflow.model_card import _ranges, model_card


def interval(scope, label, metric, value, low, high, **counts):
    return {"scope": scope, "class": label, "metric": metric, "value": value, "low": low, "high": high, **counts}


def record(**origin):
    """As `registry.log_model` makes it."""
    return {
        "settings": {
            "size": [256, 192],
            "keep_aspect": True,
            "normalisation": "z_score",
            "percentiles": [0.5, 99.5],
            "batch_size": 8,
            "test_time_augmentation": {"shift": 0.02, "rotation_degrees": 0.0},
        },
        "classes": {"0": "background", "1": "vertebrae", "2": "canal", "3": "IVD"},
        "origin": {
            "run_id": "r" * 32,
            "lumbarflow_version": "0.1.0",
            "data_kind": "real",
            "data_hash": "d" * 32,
            "split_method": "patient",
            "split_hash": "s" * 32,
            "leaky": False,
        }
        | origin,
        "preparation": {
            "labels": {"method": "direct", "table": {"vertebrae": [1, 2, 3, 101], "canal": [100], "IVD": [201, 203]}}
        },
        "cohort": {
            "sides": {
                "train": {"patients": 20, "series": 21, "slices": 417},
                "validation": {"patients": 4, "series": 5, "slices": 85},
                "test": {"patients": 6, "series": 7, "slices": 120},
            },
            "sequences": {"t1": 12, "t2_SPACE": 21},
            "pixel_spacing_mm": [[0.75, 0.875], [1.25, 1.5]],
        },
        "data": {"real": {"licence": "CC-BY-4.0", "attribution": "Somebody et al., 2024"}},
        "metrics_intervals": [
            interval("pooled", "background", "dice", 0.99, 0.98, 1.0),
            interval("pooled", "vertebrae", "dice", 0.91254, 0.9, 0.92),
            interval("pooled", "canal", "dice", 0.88, None, None),
            interval("pooled", "IVD", "dice", None, None, None),
            interval("pooled", "mean foreground", "dice", 0.9, 0.89, 0.91),
            interval("case mean", "vertebrae", "asd_mm", 0.625, 0.5, 0.75),
            interval("case mean", "canal", "asd_mm", 0.375, 0.25, 0.5, n_cases=4, n_undefined=2),
            interval("case mean", "canal", "volume_error_ml", 0.7, 0.6, 0.8),
        ],
    }


def test_card_states_every_fact():
    card = model_card(record(git_commit="0123456789abcdef", git_changed="false"), "lumbar-unet", "3", "promoted. Why.")
    for fact in (
        "# lumbar-unet, version 3\n",
        "the classes 0 background, 1 vertebrae, 2 canal, 3 IVD.",
        '`mlflow.pyfunc.load_model("models:/lumbar-unet/3")`',
        "## Promotion\n\npromoted. Why.\n",
        "Data: real scans, hash `dddddddd`. Split: patient, hash `ssssssss`.",
        "Licence of the real scans: CC-BY-4.0. Attribution: Somebody et al., 2024. As the parameters state; "
        "nobody has checked it.\n",
        "| side | patients | series | slices |\n| --- | --- | --- | --- |\n| training | 20 | 21 | 417 |\n"
        "| validation | 4 | 5 | 85 |\n| test | 6 | 7 | 120 |\n",
        "Series by sequence: t1 (12), t2_SPACE (21). Pixels as the net sees them: rows 0.75 to 1.25 mm, columns 0.88 "
        "to 1.50 mm.",
        "| class | Dice, pooled | ASD in mm, mean of cases |\n| --- | --- | --- |\n"
        "| vertebrae | 0.913 [0.900, 0.920] | 0.62 [0.50, 0.75] |\n"
        "| canal | 0.880 | 0.38 [0.25, 0.50], 4 of 6 cases |\n"
        "| IVD | – | – |\n"
        "| mean foreground | 0.900 [0.890, 0.910] | – |\n",
        "95 % intervals, bootstrap over patients",
        "by the method direct: vertebrae 1-3, 101; canal 100; IVD 201, 203.",
        "Slices of 256 x 192 pixels, aspect kept; normalisation z_score, percentiles 0.5 to 99.5; test-time "
        "augmentation: shift 0.02.",
        "no medical device",
        "Not for CT",
        "Its weights come from 20 patients, its epoch was chosen by 4 and its figures come from 6, others.",
        f"MLflow run `{'r' * 32}`; lumbarflow 0.1.0, commit `0123456789ab`. Licence of the code",
        "Apache-2.0",
    ):
        assert fact in card, fact
    assert len(card) < 4000, "the registry takes 5000 characters, and a verdict may be long"


def test_card_before_there_is_a_version_leaves_out_what_is_not_known():
    card = model_card(record(), "lumbar-unet")
    assert card.startswith("# lumbar-unet\n")
    assert "models:/lumbar-unet/VERSION" in card
    assert "Promotion" not in card and "commit" not in card and "None" not in card


def test_card_warns_of_leaks_and_of_scans_that_nobody_took():
    usual = model_card(record(), "lumbar-unet")
    assert "Too good" not in usual and "synthetic" not in usual
    leaky = model_card(record(leaky=True), "lumbar-unet")
    assert "**Too good:** slices of the same patients" in leaky
    assert "its epoch was chosen by 4 and its figures come from 6, some of them the same." in leaky
    synthetic = model_card(record(data_kind="synthetic"), "lumbar-unet")
    assert "The scans are synthetic: the figures say nothing of a clinic's scans" in synthetic
    assert "commit `0123` with changes" in model_card(record(git_commit="0123", git_changed="true"), "lumbar-unet")


def test_licence_that_was_not_stated_is_not_made_up():
    facts = record(data_kind="mixed") | {
        "data": {
            "real": {"licence": None, "attribution": None},
            "synthetic": {"licence": "CC0-1.0", "attribution": "Computed."},
        }
    }
    card = model_card(facts, "lumbar-unet")
    assert "Licence of the real scans: not recorded. Attribution: not recorded.\n" in card
    assert "Licence of the synthetic scans: CC0-1.0. Attribution: Computed.\n" in card


@given(st.sets(st.integers(1, 300), min_size=1))
def test_ranges_of_ids_read_back(ids):
    words = _ranges(ids)
    assert LabelTable({"canal": words.split(", ")}).to_dict()["canal"] == sorted(ids)


@pytest.mark.parametrize(("ids", "words"), [([7], "7"), ([3, 1, 2, 9], "1-3, 9"), ([1, 3, 4], "1, 3-4")])
def test_ranges_of_ids_in_words(ids, words):
    assert _ranges(ids) == words


def test_tables_have_equal_columns_in_all_rows():
    card = model_card(record(), "lumbar-unet")
    for table in re.findall(r"(?:^\|.*\|\n)+", card, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
