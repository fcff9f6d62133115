"""Runs are known by what determines them, and their tables are by hand."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from lumbarflow import comparison
from lumbarflow.store import SeriesStore, Work

MANIFEST = {"content_hash": "abc", "size": [16, 16], "sides": {"train": {"1_t1": [0]}}}
SETTINGS = {"model": {"name": "plain_unet"}, "loss": {"gamma": 4.0}, "training": {"epochs": 2}, "augmentation": {}}


def test_a_run_is_named_by_model_data_and_settings_alone():
    first = comparison.plan_run(MANIFEST, SETTINGS)
    assert first["entry"].startswith("plain_unet-")
    assert comparison.plan_run(dict(reversed(MANIFEST.items())), dict(reversed(SETTINGS.items()))) == first
    others = [
        comparison.plan_run(MANIFEST | {"content_hash": "abd"}, SETTINGS),
        comparison.plan_run(MANIFEST, SETTINGS | {"training": {"epochs": 3}}),
        comparison.plan_run(MANIFEST, SETTINGS | {"model": {"name": "attention_unet"}}),
    ]
    assert len({run["entry"] for run in (first, *others)}) == 4
    assert json.loads(json.dumps(first)) == first


def test_an_unknown_model_is_an_error():
    with pytest.raises(ValueError, match=r"model.name is 'vnet'; expected one of \['atlas', 'attention_unet'"):
        comparison.plan_run(MANIFEST, SETTINGS | {"model": {"name": "vnet"}})


def test_planning_and_looking_at_runs_does_not_import_keras():
    code = (
        "import sys, lumbarflow.comparison as c\n"
        f"c.plan_run({MANIFEST!r}, {SETTINGS!r})\n"
        "assert not {'keras', 'tensorflow'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def by_class(**dice) -> pd.DataFrame:
    """One table of two scopes for each run; the mean foreground of three equal classes is theirs."""
    rows = []
    for run, value in dice.items():
        for scope, shift in (("pooled", 0.0), ("slice mean", -0.01), ("case mean", -0.02)):
            for name in ("background", "vertebrae", "canal", "IVD", "mean foreground"):
                figures = {"dice": value + shift, "asd_mm": 1 + shift, "nsd_1mm": 0.9, "hd95_mm": 3.0}
                figures |= {"n_slices": 40, "n_cases": 6, "n_surface": 5, "n_nsd": 6, "n_missing_prediction": 1}
                rows.append({"run": run, "scope": scope, "class": name} | figures)
    return pd.DataFrame(rows)


def test_the_leak_is_slice_minus_patient():
    figures = by_class(slice=0.95, patient=0.92)
    limits = figures[["run", "scope", "class"]].assign(metric="dice", low=figures["dice"] - 0.1, high=0.99)
    table = comparison.leakage_table(figures, limits[limits["scope"] == "pooled"], ["dice"])
    assert len(table) == 2 * 4  # scopes, foreground classes and their mean
    row = table[(table["scope"] == "slice mean") & (table["class"] == "IVD")].iloc[0]
    assert (row["slice_split"], row["patient_split"], row["difference"]) == pytest.approx((0.94, 0.91, 0.03))
    assert np.isnan(row["slice_low"]), "no interval was given for means over slices"
    row = table[(table["scope"] == "pooled") & (table["class"] == "IVD")].iloc[0]
    limits = row[["slice_low", "slice_high", "patient_low", "patient_high"]].tolist()
    assert limits == pytest.approx([0.85, 0.99, 0.82, 0.99])
    assert (row["slice_n"], row["patient_n"]) == (40, 40)
    assert "background" not in set(table["class"])


@pytest.fixture
def trained(tmp_path) -> SeriesStore:
    store = SeriesStore(tmp_path / "runs")
    record = {"parameters": 7, "epochs": 2, "best_epoch": 1, "seconds": 90.0, "hardware": {"precision": "float32"}}
    history = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}]
    store.update({"plain_unet-1": Work("k", lambda: {"history.json": history, "record.json": record})})
    return store


PLAN = {"first": {"entry": "plain_unet-1", "settings": SETTINGS}}


def test_baselines_stand_with_what_they_cost(trained):
    figures = by_class(first=0.9)
    limits = figures[figures["scope"] == "pooled"][["run", "scope", "class"]].assign(
        metric="dice", value=0.9, low=0.85, high=0.93
    )
    table = comparison.baselines_table(PLAN, trained, figures, limits)
    assert table["class"].tolist() == ["vertebrae", "canal", "IVD", "mean foreground"]
    row = table.iloc[0]
    assert (row["model"], row["parameters"], row["epochs"], row["best_epoch"], row["minutes"]) == (
        "U-Net",
        7,
        2,
        1,
        1.5,
    )
    assert (row["dice"], row["dice_low"], row["dice_high"]) == (0.9, 0.85, 0.93)
    assert row["asd_mm"] == pytest.approx(0.98), "the mean over cases"
    counts = row[["n_cases", "n_surface", "n_nsd", "n_missing_prediction"]].tolist()
    assert (counts, row["precision"]) == ([6, 5, 6, 1], "float32")


def test_predictions_of_runs_do_not_mix():
    assert comparison.prediction_entry("slice", "1_t1") != comparison.prediction_entry("patient", "1_t1")
