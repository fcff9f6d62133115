"""Pipelines beside the main job: leakage, baselines, other tools, the audit of labels, the paper, the report."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
import yaml

from lumbarflow.imaging import LabelMap, read_volume, write_volume
from lumbarflow.split import split_slices

FEW_CLASSES = {"filter": {"minimum_classes": 3}}
ONE_EPOCH = {"training": {"epochs": 1}}
FIGURES = ["dice", "asd_mm", "hd95_mm", "nsd_1mm", "nsd_2mm"]


@pytest.mark.usefixtures("quick_nets")
def test_leakage_and_baselines_train_each_net_once_and_end_in_the_report(kedro_run, raw, project, caplog):
    settings = {"raw_dir": str(raw), **FEW_CLASSES, **ONE_EPOCH}
    with caplog.at_level(logging.INFO):
        catalog = kedro_run("leakage", **settings)
    assert "train: 2 made" in caplog.text

    # The two runs differ in their split alone, and only the slice split has patients on two sides.
    plan = catalog.load("leakage_plan")
    for name, shares_patients in (("slice", True), ("patient", False)):
        manifest = plan[name]["manifest"]
        patients = [
            {manifest["series"][series]["patient"] for series in chosen} for chosen in manifest["sides"].values()
        ]
        assert any(a & b for i, a in enumerate(patients) for b in patients[i + 1 :]) == shares_patients
        assert manifest["leaky"] == shares_patients
    assert plan["slice"]["settings"] == plan["patient"]["settings"]
    table = pd.read_csv(project / "data/08_reporting/leakage_table.csv")
    np.testing.assert_allclose(table["difference"], table["slice_split"] - table["patient_split"])
    pooled = catalog.load("leakage_by_class").set_index(["run", "scope", "class"])["dice"]
    row = table[(table["scope"] == "pooled") & (table["class"] == "canal") & (table["metric"] == "dice")]
    assert row["slice_split"].item() == pytest.approx(pooled.loc[("slice", "pooled", "canal")])
    assert row["patient_split"].item() == pytest.approx(pooled.loc[("patient", "pooled", "canal")])

    # The patient run's net is the paper's net of the baselines: it is not trained again.
    caplog.clear()
    with caplog.at_level(logging.INFO):
        catalog = kedro_run("baselines", **settings, baselines={"models": {"attention_unet": None}})
    assert "train: 2 made, 1 unchanged" in caplog.text
    models = catalog.load("baselines_table")
    assert models["run"].unique().tolist() == ["modified_unet", "plain_unet", "atlas"]
    assert models.groupby("run")["class"].apply(list).iloc[0] == ["vertebrae", "canal", "IVD", "mean foreground"]
    assert set(FIGURES) <= set(models)
    assert models.loc[models["run"] == "plain_unet", "parameters"].unique() == [1 * 4 + 4]  # of the one layer
    tests = catalog.load("baselines_tests")
    assert set(tests["model"]) == {"plain_unet", "atlas"}
    assert tests["metric"].unique().tolist() == ["dice", "asd_mm", "nsd_1mm"]
    assert (tests["p_holm"].dropna() >= tests["p"].dropna()).all()

    # The report needs the main job, and takes up what the others have left.
    with pytest.raises(Exception, match="metrics_by_class|comparison"):
        kedro_run("report")
    kedro_run("fit", **settings)
    kedro_run("evaluate", **settings)
    kedro_run("report", **settings)
    html = (project / "data/08_reporting/report.html").read_text()
    markdown = (project / "data/08_reporting/report.md").read_text()
    for text in (html, markdown):
        assert "Attention U-Net" not in text
        assert "Atlas (no learning)" in text
        assert "Ahmed et al. 2024" in text
        assert "no patient on two sides" in text
        assert "kedro run --pipeline=apta_audit" in text  # what has not been made is named
        assert "kedro run --pipeline=leakage" not in text
    for name in ("overlays", "confusion_matrix", "training_curves", "case_distribution", "comparison"):
        assert f"({name}.png)" in markdown
        assert (project / "data/08_reporting" / f"{name}.png").is_file()
    times = catalog.load("run_times")
    assert {"leakage", "baselines", "fit", "evaluate", "report"} <= set(times)


def test_baselines_need_the_model_that_the_others_are_tested_against(kedro_run, raw):
    with pytest.raises(ValueError, match=r"baselines.reference is 'unet'; expected one of baselines.models"):
        kedro_run("baselines", raw_dir=str(raw), baselines={"reference": "unet"}, **FEW_CLASSES)


def write_external(raw, folder, change=None):
    """The raw masks as another tool would give them: its own ids, another format."""
    for path in sorted((raw / "masks").iterdir()):
        if path.suffix == ".raw" or path.suffix == ".zraw":
            continue
        mask = read_volume(path, LabelMap)
        name = path.name.split(".")[0]
        ids = np.select([mask.array == 1, mask.array == 100, mask.array == 201], [7, 8, 9], 0).astype(np.uint8)
        if change:
            ids = change(name, ids)
        if ids is not None:
            write_volume(mask.with_array(ids), folder / f"{name}.nii.gz")


TABLE = {"vertebrae": [7], "canal": [8], "IVD": [9]}


def test_other_tools_masks_are_scored_without_any_training(kedro_run, raw, project, tmp_path_factory, caplog):
    folder = tmp_path_factory.mktemp("external")

    def change(name, ids):
        if name == "1_t2":
            return None  # missing
        if name == "2_t2":
            ids[0, 0, 0] = 99  # an id that nobody knows
        if name == "4_t2":
            ids[ids == 9] = 0  # all discs missed
        return ids

    write_external(raw, folder, change)
    with caplog.at_level(logging.WARNING):
        catalog = kedro_run(
            "evaluate_external", raw_dir=str(raw), external_dir=str(folder), external={"name": "tool", "table": TABLE}
        )
    report = catalog.load("external_report").set_index("series")
    assert report["outcome"].to_dict() == {
        "1_t1": "accepted", "1_t2": "absent", "2_t2": "rejected", "3_t2_SPACE": "accepted", "4_t2": "accepted",
    }  # fmt: skip
    assert "left out 2_t2" in caplog.text and "99" in report.loc["2_t2", "found"]
    by_case = catalog.load("external_by_case").set_index(["series", "class"])
    assert by_case.loc[("1_t1", "IVD"), "dice"] == 1
    assert by_case.loc[("1_t1", "IVD"), "asd_mm"] == 0
    assert by_case.loc[("4_t2", "IVD"), "dice"] == 0
    assert by_case.loc[("4_t2", "IVD"), "missing"] == "prediction"
    by_class = catalog.load("external_by_class")
    assert (by_class["tool"] == "tool").all()
    mean = by_class[(by_class["scope"] == "case mean") & (by_class["class"] == "IVD")].iloc[0]
    assert (mean["dice"], mean["n_cases"], mean["n_missing_prediction"]) == (pytest.approx(2 / 3), 3, 1)
    assert by_class["soft_dice"].isna().all(), "masks have no probabilities"
    assert not (project / "data/06_models").exists()

    # The test side alone, as a split by patient has it.
    catalog = kedro_run(
        "evaluate_external", raw_dir=str(raw), external_dir=str(folder), external={"table": TABLE, "series": "test"}
    )
    split = yaml.safe_load((project / "conf/base/parameters_preprocess.yml").read_text())["split"]
    sides = split_slices(catalog.load("series_index"), split)
    assert set(catalog.load("external_report")["series"]) == set(sides.loc[sides["side"] == "test", "series"])


def test_a_folder_without_masks_is_one_clear_error(kedro_run, raw, tmp_path_factory):
    empty = tmp_path_factory.mktemp("external")
    with pytest.raises(ValueError, match=r"no volumes; expected masks named like the images, e.g. 1_t1.nii.gz"):
        kedro_run("evaluate_external", raw_dir=str(raw), external_dir=str(empty))
    with pytest.raises(ValueError, match=r"external.series is 'some'; expected one of all, test"):
        kedro_run("evaluate_external", raw_dir=str(raw), external_dir=str(empty), external={"series": "some"})


def test_the_audit_compares_the_papers_labels_with_the_direct_map(kedro_run, raw, project):
    catalog = kedro_run("apta_audit", raw_dir=str(raw))
    slices = catalog.load("apta_audit")
    assert set(slices["series"]) == {"1_t1", "1_t2", "2_t2", "3_t2_SPACE", "4_t2"}
    assert len(slices) == 5 * 4 * 4  # series, slices, classes
    # Grey 127 of id 100 beside id 201 is canal, 255 disc, 1 vertebra: only neighbourhoods change anything.
    summary = catalog.load("apta_audit_summary").set_index("class")
    assert summary.loc["canal", "direct_pixels"] == 5 * 4 * 18
    np.testing.assert_array_equal(
        summary["apta_pixels"] - summary["direct_pixels"], summary["gained"] - summary["lost"]
    )
    ingested = kedro_run("ingest", raw_dir=str(raw), labels={"method": "apta"}).load("ingested_series")
    counted = sum(np.array(record["class_counts"]).sum(axis=0) for record in ingested.records().values())
    assert counted.tolist() == summary["apta_pixels"].tolist()


def test_the_papers_protocol_runs_with_its_oddities(kedro_run, raw):
    net = {"encoder_widths": [4] * 3, "decoder_widths": [4]}
    net |= {"encoder_dropouts": [0.1] * 3, "decoder_dropouts": [0.1]}
    catalog = kedro_run(
        "train", "paper", raw_dir=str(raw), preprocess={"size": [32, 32]}, training={"epochs": 1}, model=net
    )
    split = catalog.load("split")
    per_slice = split.groupby(["series", "slice"])["side"].apply(set)
    assert sorted(map(sorted, set(map(frozenset, per_slice)))) == [["test", "validation"], ["train"]]
    assert (split["side"] == "test").sum() == 2  # 10 % of 20 slices
    manifest = catalog.load("model_input").manifest
    assert manifest["leaky"]
    assert manifest["settings"]["preprocess"]["normalisation"] == "column_l2"
    series, index = catalog.load("model_input").slices("train")[0]
    columns = np.square(catalog.load("model_input").image(series, index).astype(float)).sum(axis=0)
    np.testing.assert_allclose(columns, 1, atol=5e-3)
    paper = catalog.load("paper_metrics")
    assert paper["n_slices"].tolist() == [2] * 4
    # Cases of which two slices were scored have no volume, and say so.
    by_class = catalog.load("metrics_by_class").set_index(["scope", "class"])
    assert np.isnan(by_class.loc[("case mean", "IVD"), "asd_mm"])
    assert by_class.loc[("case mean", "IVD"), "n_surface"] == 0
