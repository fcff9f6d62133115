"""Runs are known by what determines them, and their tables are by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

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


# --- rows of techniques

ROWS = {
    "base": {},
    "wide": {"model": {"batch_norm_momentum": 0.5}, "training": {"seed": 3}},
    "turned": {"evaluation": {"test_time_augmentation": {"rotation_degrees": 3.0}}},
    "other": {"model": {"name": "plain_unet"}},
    "large": "not run: needs other slices",
}
SHARED = {
    "model": {"name": "modified_unet", "upsample_block": "all"},
    "loss": {"gamma": 4.0},
    "training": {"epochs": 2},
    "augmentation": {},
}


def test_rows_change_what_they_name_and_share_the_rest():
    plan = comparison.plan_rows(MANIFEST, SHARED, ROWS, "screen")
    assert list(plan) == ["base", "wide", "turned", "other"]
    assert plan["base"]["settings"] == SHARED
    assert plan["wide"]["settings"] == SHARED | {
        "model": {"name": "modified_unet", "upsample_block": "all", "batch_norm_momentum": 0.5},
        "training": {"epochs": 2, "seed": 3},
    }
    # How a net is used does not make it another one; the settings of one net are none of another's.
    assert plan["turned"]["entry"] == plan["base"]["entry"]
    assert plan["turned"]["evaluation"] == {"test_time_augmentation": {"rotation_degrees": 3.0}}
    assert plan["other"]["settings"]["model"] == {"name": "plain_unet"}
    with pytest.raises(ValueError, match=r"unknown setting screen.rows.slip.trainin; expected some of \['model'"):
        comparison.plan_rows(MANIFEST, SHARED, {"slip": {"trainin": {}}}, "screen")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"emma": 1}}, "unknown setting training.emma"),
        ({"training": {"ema_momentum": 2}}, "training.ema_momentum is 2; expected a share"),
        ({"augmentation": {"noise": -1}}, "augmentation.noise is -1; expected"),
        ({"model": {"width": 1}}, "unknown setting model.width"),
        ({"model": {"channels": 3}}, "unknown setting model.channels"),
        ({"loss": {"gama": 1}}, "unknown setting loss.gama"),
        ({"evaluation": {"metrics": {}}}, "unknown setting screen.rows.slip.evaluation.metrics"),
        ({"evaluation": {"test_time_augmentation": {"shift": 2}}}, "test_time_augmentation.shift is 2; expected"),
    ],
)
def test_a_slip_in_a_row_is_found_before_anything_is_trained(changes, message):
    with pytest.raises(ValueError, match=message):
        comparison.plan_rows(MANIFEST, SHARED, {"base": {}, "slip": changes}, "screen")


def test_settings_without_effect_do_not_make_another_net():
    run = comparison.plan_run(MANIFEST, SHARED)
    same = SHARED | {"training": {"epochs": 2, "workers": 4, "devices": 2, "resume": False, "batch_size": 8}}
    assert comparison.plan_run(MANIFEST, same)["key"] == run["key"]
    # What it cut short would be stored as the run's net.
    cut = SHARED | {"training": {"epochs": 2, "max_minutes": 1}}
    assert comparison.plan_run(MANIFEST, cut)["key"] != run["key"]


def test_the_papers_recipe_is_the_papers_in_every_environment():
    configured = yaml.safe_load((Path(__file__).parents[1] / "conf/base/parameters_recipes.yml").read_text())
    row = {"paper_recipe": configured["recipes"]["rows"]["paper_recipe"]}
    base = yaml.safe_load((Path(__file__).parents[1] / "conf/base/parameters_fit.yml").read_text())
    other = {
        "model": base["model"] | {"upsample_block": "all", "batch_norm_momentum": 0.5, "deep_supervision": 2},
        "loss": base["loss"] | {"gamma": 1.0, "alpha": 0.1, "missed_weight": 0.9, "boundary_weight": 3.0},
        "training": base["training"]
        | {"epochs": 3, "batch_size": 2, "learning_rate": 0.1, "ema_momentum": 0.5, "neighbours": 2, "patience": 2}
        | {"weight_decay": 0.1, "warmup_epochs": 1, "balanced_sampling": 1.0},
        "augmentation": base["augmentation"] | {"enabled": True},
    }
    keys = {comparison.plan_rows(MANIFEST, shared, row, "recipes")["paper_recipe"]["key"] for shared in (base, other)}
    assert len(keys) == 1
    paper = yaml.safe_load((Path(__file__).parents[1] / "conf/paper/parameters_fit.yml").read_text())
    settings = comparison.plan_rows(MANIFEST, other, row, "recipes")["paper_recipe"]["settings"]
    for section, values in paper.items():
        assert {name: settings[section][name] for name in values} == values


def test_the_screen_sets_rows_beside_the_reference_and_names_those_not_run(tmp_path):
    plan = comparison.plan_rows(MANIFEST, SHARED, ROWS, "screen")
    history = [
        {"epoch": 1, "val_mean_iou": 0.7, "slices_per_second": 5.0},
        {"epoch": 2, "val_mean_iou": 0.6, "slices_per_second": 7.0},
    ]
    record = {"parameters": 7, "epochs": 2, "best_epoch": 1, "seconds": 90.0}
    store = SeriesStore(tmp_path)
    store.update(
        {
            plan["base"]["entry"]: Work("k", lambda: {"history.json": history, "record.json": record}),
            plan["wide"]["entry"]: Work("k", lambda: {"record.json": {"key": None, "not_run": "not run: late"}}),
            plan["other"]["entry"]: Work("k", lambda: {"history.json": history, "record.json": record}),
        }
    )
    table = comparison.screen_table(ROWS, plan, store, by_class(base=0.8, turned=0.9, other=0.75), "base")
    assert table["row"].tolist() == ["turned", "base", "other", "wide", "large"]
    assert table["outcome"].tolist() == ["run", "run", "run", "not run: late", "not run: needs other slices"]
    assert table["difference"].tolist()[:3] == pytest.approx([0.1, 0, -0.05])
    assert table["difference"].isna().tolist() == [False] * 3 + [True] * 2
    row = table.iloc[1]
    assert (row["epochs"], row["best_epoch"], row["val_mean_iou"], row["minutes"]) == (2, 1, 0.7, 1.5)
    assert (row["dice_IVD"], row["slices_per_second"], row["parameters"]) == (0.8, 6.0, 7)
    assert json.loads(table.iloc[3]["changes"]) == ROWS["wide"]


def test_seeds_are_summarised_by_recipe_and_class():
    figures = by_class(a7=0.8, a8=0.9, b7=0.5)
    table = comparison.seeds_table(figures, {"a7": ("a", 7), "a8": ("a", 8), "b7": ("b", 7)})
    assert table["recipe"].tolist() == ["a"] * 4 + ["b"] * 4
    assert table["class"].tolist()[:4] == ["vertebrae", "canal", "IVD", "mean foreground"]
    row = table.iloc[0]
    assert (row["seeds"], row["dice_mean"], row["dice_lowest"], row["dice_highest"]) == (
        2,
        pytest.approx(0.85),
        0.8,
        0.9,
    )
    # Of two values: their distance over the root of 2.
    assert row["dice_std"] == pytest.approx(0.1 / 2**0.5)
    assert row["asd_mm_mean"] == pytest.approx(0.98), "mean over cases"
    assert (table.iloc[4]["seeds"], np.isnan(table.iloc[4]["dice_std"])) == (1, True)
    # What the mean ASD is over, and what it is silent of.
    assert (row["n_surface"], row["n_missing_prediction"]) == (2 * 5, 2 * 1)
