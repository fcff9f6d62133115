"""Techniques on the validation patients, and recipes with several seeds on the test patients."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd
import pytest
import yaml

from lumbarflow.model_input import ModelInput
from lumbarflow.pipelines.recipes.nodes import plan_recipes

SETTINGS = {
    "filter": {"minimum_classes": 3},
    "preprocess": {"size": [32, 32]},
    "model": {
        "encoder_widths": [2] * 3, "encoder_dropouts": [0.0] * 3, "decoder_widths": [2], "decoder_dropouts": [0.0],
    },
    "training": {"epochs": 1},
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("quick_nets")
NAMES = list(
    yaml.safe_load((Path(__file__).parents[2] / "conf/base/parameters_screen.yml").read_text())["screen"]["rows"]
)


@pytest.fixture
def model_input_of_nothing(tmp_path) -> ModelInput:
    return ModelInput(tmp_path, {"size": [32, 32]})


def screen(rows, **changes):
    # Kedro merges what is given at run time into the configured rows: those not wanted get a reason.
    left_out = {name: "left out by the test" for name in NAMES if name not in rows and name != "larger_input"}
    return {"changes": {"training": {"epochs": 1}}, "rows": left_out | rows} | changes


def test_a_screen_scores_validation_patients_goes_on_and_names_what_was_not_run(kedro_run, raw, project, caplog):
    rows = {
        "base": {},
        "shifted_and_rotated": {"evaluation": {"test_time_augmentation": {"shift": 0.1}}},
        "neighbouring_slices": {"training": {"neighbours": 1}},
        "group_norm": {"model": {"normalisation": "group", "groups": 7}},
    }
    settings = SETTINGS | {"raw_dir": str(raw)}
    # The time is over before the first row: there is nothing to compare, and nothing is pretended.
    with pytest.raises(ValueError, match=r"no row has a net \(base not run: screen.max_minutes \(1e-09\) were over"):
        kedro_run("screen", **settings, screen=screen(rows, max_minutes=1e-9))

    catalog = kedro_run("screen", **settings, screen=screen(rows, max_minutes=None))
    table = pd.read_csv(project / "data/08_reporting/screen_table.csv").set_index("row")
    assert (table.loc[["base", "shifted_and_rotated", "neighbouring_slices"], "outcome"] == "run").all()
    assert table.loc["group_norm", "outcome"].startswith("failed: modified_unet: ")
    assert "groups" in table.loc["group_norm", "outcome"]
    assert table.loc["larger_input", "outcome"].startswith("not run: needs slices prepared at another size")
    assert (table.loc[list(set(NAMES) - set(rows) - {"larger_input"}), "outcome"] == "left out by the test").all()
    assert table.loc["base", "difference"] == 0
    means = table["dice_mean_foreground"].dropna()
    assert means.is_monotonic_decreasing and len(means) == 3
    # The same net, used in another way.
    assert table.loc["base", "val_mean_iou"] == table.loc["shifted_and_rotated", "val_mean_iou"]
    sides = catalog.load("model_input").manifest["sides"]
    predicted = {entry.split("@")[1] for entry in catalog.load("screen_predictions").series()}
    assert predicted == set(sides["validation"])
    assert not predicted & set(sides["test"])

    # What is there is taken; what failed is tried again.
    caplog.clear()
    with caplog.at_level(logging.INFO):
        kedro_run("screen", **settings, screen=screen(rows, max_minutes=None))
    assert "train: 0 made, 2 unchanged and taken from the last run, 0 removed, 1 failed" in caplog.text
    assert f"{len(table) - 3} of {len(table)} rows of the screen (reasons: " in caplog.text
    assert not any((project / "data/06_models/training").iterdir()), "checkpoints go when the store has the net"


def test_the_reference_of_a_screen_has_to_be_one_of_its_rows(kedro_run, raw):
    with pytest.raises(ValueError, match="screen.reference is 'paper'; expected one of the rows that are run"):
        kedro_run("screen", **SETTINGS, raw_dir=str(raw), screen={"reference": "paper"})


def test_recipes_are_scored_on_the_test_patients_with_each_seed(kedro_run, raw, project):
    recipes = {"seeds": [1, 2], "rows": {"paper_recipe": {"training": {"epochs": 1}}}}
    catalog = kedro_run("recipes", **SETTINGS, raw_dir=str(raw), recipes=recipes)
    plan = catalog.load("recipe_plan")
    assert list(plan) == ["ours seed 1", "paper_recipe seed 1", "ours seed 2", "paper_recipe seed 2"]
    assert plan["ours seed 2"]["settings"]["training"]["seed"] == 2
    paper = plan["paper_recipe seed 1"]["settings"]
    assert (paper["loss"]["dice_over"], paper["training"]["learning_rate_schedule"]) == ("pooled", "constant")
    assert paper["model"]["encoder_widths"] == SETTINGS["model"]["encoder_widths"]
    predicted = {entry.split("@")[1] for entry in catalog.load("recipe_predictions").series()}
    assert predicted == set(catalog.load("model_input").manifest["sides"]["test"])

    table = pd.read_csv(project / "data/08_reporting/recipes_table.csv").set_index(["recipe", "class"])
    figures = catalog.load("recipes_by_class").set_index(["run", "scope", "class"])["dice"]
    values = [figures.loc[(f"ours seed {seed}", "pooled", "canal")] for seed in (1, 2)]
    row = table.loc[("ours", "canal")]
    assert (row["seeds"], row["dice_mean"]) == (2, pytest.approx(sum(values) / 2))
    assert row["dice_std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


def test_seeds_are_named_once(kedro_run, raw):
    with pytest.raises(ValueError, match=r"recipes.seeds is \[1, 1\]; expected at least one, none of them twice"):
        kedro_run("recipes", **SETTINGS, raw_dir=str(raw), recipes={"seeds": [1, 1]})


def test_a_recipe_has_no_seed_of_its_own(model_input_of_nothing):
    rows = {"ours": {"training": {"seed": 1}}, "later": "not today"}
    with pytest.raises(
        ValueError, match=r"recipes.rows.ours.training.seed is set; expected none, as recipes.seeds says"
    ):
        plan_recipes(model_input_of_nothing, {}, {}, {}, {}, {"seeds": [7, 8], "rows": rows})


def test_a_leaky_split_is_neither_screened_nor_gives_final_rows(kedro_run, raw):
    leaky = {"split": {"method": "slice"}, "filter": {"minimum_classes": 3}}
    with pytest.raises(ValueError, match="slices of one patient on several sides; expected none for a screen"):
        kedro_run("screen", raw_dir=str(raw), **leaky)
    with pytest.raises(ValueError, match="slices of one patient on several sides; expected none for final rows"):
        kedro_run("recipes", raw_dir=str(raw), **leaky)
