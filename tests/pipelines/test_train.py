"""The main job on a small synthetic cohort, from raw volumes to a registered model."""

from __future__ import annotations

import json
import logging

import numpy as np
import pandas as pd
import pytest

from lumbarflow.imaging import LabelMap, Orientation, read_volume
from lumbarflow.metrics import confusion_matrix, mean_foreground_dice

# What the small net must reach: an untrained one stays below half of it (the second run shows it), and a model with
# two foreground classes in each other's place cannot score above 1/3.
LEARNED = 0.55


def test_train_goes_from_raw_volumes_to_a_champion(kedro_run, project, caplog):
    import mlflow

    with caplog.at_level(logging.INFO):
        catalog = kedro_run("train")

    # Every stage has left what the catalog promises.
    assert (catalog.load("ingest_report")["outcome"] == "accepted").all()
    split = catalog.load("split")
    assert split.groupby("patient")["side"].nunique().max() == 1
    model_input = catalog.load("model_input")
    assert model_input.manifest["data_kind"] == "synthetic"
    history = catalog.load("training_history")
    assert history["epoch"].tolist() == list(range(1, len(history) + 1))

    # The figures are those of the predictions on the native grid, recomputed here from the files.
    pooled = np.zeros((4, 4), np.int64)
    records = catalog.load("ingested_series").records()
    for series in sorted(set(split.loc[split["side"] == "test", "series"])):
        mask = read_volume(project / "data/01_raw/masks" / f"{series}.mha", LabelMap)
        prediction = catalog.load("predictions").label_map(series, "labels.mha")
        assert prediction.spacing_mm == mask.spacing_mm
        assert prediction.origin_mm == mask.origin_mm
        np.testing.assert_array_equal(prediction.direction, mask.direction)
        pooled += confusion_matrix(LABEL_TABLE[mask.array], prediction.array)
        assert records[series]["patient"] in set(split.loc[split["side"] == "test", "patient"])
    summary = catalog.load("evaluation_summary")
    assert summary["mean_foreground_dice"] == pytest.approx(mean_foreground_dice(pooled), abs=1e-12)
    assert summary["mean_foreground_dice"] > LEARNED
    assert summary["mean_foreground_dice"] < summary["ceiling_mean_foreground_dice"] <= 1

    by_class = pd.read_csv(project / "data/08_reporting/metrics_by_class.csv")
    assert by_class.columns.tolist()[:3] == ["class", "scope", "dice"]
    row = by_class[(by_class["class"] == "mean foreground") & (by_class["scope"] == "pooled")]
    assert row["dice"].item() == pytest.approx(summary["mean_foreground_dice"])
    for name in ("overlays.png", "confusion_matrix.png", "ingest_report.csv", "training_history.csv"):
        assert (project / "data/08_reporting" / name).stat().st_size > 0

    # MLflow: parameters, figures per epoch, the data's hash, artefacts, and a champion that predicts as we do.
    registration = catalog.load("registration")
    assert (registration["name"], registration["version"], registration["champion"]) == ("lumbar-unet", "1", "1")
    run = mlflow.MlflowClient().get_run(registration["run_id"])
    assert run.data.params["training.seed"] == "7"
    assert run.data.tags["data_hash"] == model_input.manifest["data_hash"]
    assert run.data.tags["leaky"] == "false"
    epochs = mlflow.MlflowClient().get_metric_history(run.info.run_id, "val_mean_iou")
    assert [metric.step for metric in epochs] == history["epoch"].tolist()
    artefacts = {file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
    assert {"metrics_by_class.csv", "metrics_by_case.csv", "overlays.png", "confusion_matrix.json"} <= artefacts

    champion = mlflow.pyfunc.load_model("models:/lumbar-unet@champion")
    series = next(iter(model_input.manifest["sides"]["test"]))
    image = catalog.load("ingested_series").volume(series, "image.mha")
    spacing = [image.spacing_mm[1], image.spacing_mm[0]]
    pulled = champion.predict(image.array, params={"pixel_spacing_mm": spacing})
    stored = catalog.load("predictions").label_map(series, "labels.mha").array
    np.testing.assert_array_equal(
        pulled, Orientation.from_dict(records[series]["orientation"]).apply(stored), "train/serve skew"
    )
    assert "train finished" in caplog.text
    assert "see " in caplog.text
    # The champion on the raw file, by its path and through the predict pipeline: the same voxels as in the evaluation.
    by_path = champion.predict(str(project / "data/01_raw/images" / f"{series}.mha"))
    np.testing.assert_array_equal(by_path["labels"], stored, "train/serve skew")
    kedro_run("predict", predict={"preview": False, "measurements": False})
    delivered = read_volume(project / "data/07_model_output/scans" / f"{series}_seg.mha", LabelMap)
    np.testing.assert_array_equal(delivered.array, stored, "train/predict skew")

    # The same command again: prepared data are reused, a second version is made, and being worse it stays a version.
    caplog.clear()
    with caplog.at_level(logging.INFO):
        catalog = kedro_run("train", training={"epochs": 1})
    assert "ingest: 0 made" in caplog.text
    assert "preprocess: 0 made" in caplog.text
    registration = catalog.load("registration")
    assert (registration["version"], registration["promoted"], registration["champion"]) == ("2", False, "1")
    # One epoch at this size is as good as untrained: the bound tells it from a trained net.
    assert catalog.load("evaluation_summary")["mean_foreground_dice"] < LEARNED / 2
    assert "is lower than" in registration["reason"]


@pytest.mark.usefixtures("quick_nets")
def test_the_slice_split_is_tagged_leaky_and_never_becomes_champion(kedro_run, raw, caplog):
    import mlflow

    with caplog.at_level(logging.WARNING):
        catalog = kedro_run("train", raw_dir=str(raw), split={"method": "slice"}, training={"epochs": 1})
    assert "split by slice" in caplog.text
    registration = catalog.load("registration")
    assert not registration["promoted"]
    assert registration["champion"] is None
    assert "leaky" in registration["reason"]
    assert mlflow.MlflowClient().get_run(registration["run_id"]).data.tags["leaky"] == "true"


@pytest.mark.usefixtures("quick_nets")
def test_steps_run_one_by_one_must_fit_together(kedro_run, raw, monkeypatch, tmp_path_factory):
    import mlflow

    # Another store than the default, named as a server would be.
    store = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    raw = {"raw_dir": str(raw), "filter": {"minimum_classes": 3}}
    kedro_run("ingest", **raw)
    kedro_run("preprocess", **raw)
    kedro_run("fit", training={"epochs": 1})
    kedro_run("preprocess", **raw, split={"seed": 1})
    with pytest.raises(ValueError, match=r"model: it was trained on the model input"):
        kedro_run("evaluate")
    kedro_run("preprocess", **raw)
    kedro_run("evaluate")
    registered = kedro_run("register").load("registration")
    assert registered["version"] == "1"
    kedro_run("fit", training={"epochs": 1, "seed": 8})
    with pytest.raises(ValueError, match=r"evaluation_summary: its figures are of another model"):
        kedro_run("register")
    client = mlflow.MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("lumbarflow").experiment_id])
    assert all("data_hash" in run.data.tags for run in runs if run.info.status == "FINISHED")
    assert len(runs) == 6


@pytest.mark.usefixtures("quick_nets")
def test_an_interrupted_fit_goes_on_and_its_new_run_has_the_whole_curve(kedro_run, raw, monkeypatch, caplog, project):
    import mlflow

    from lumbarflow import tracking

    settings = {"raw_dir": str(raw), "filter": {"minimum_classes": 3}, "preprocess": {"size": [32, 32]}}
    settings["training"] = {"epochs": 3}
    kedro_run("ingest", **settings)
    kedro_run("preprocess", **settings)
    log_epoch = tracking.log_epoch

    def interrupted(row, prefix=""):
        log_epoch(row, prefix)
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tracking, "log_epoch", interrupted)
        kedro_run("fit", **settings)
    with caplog.at_level(logging.INFO):
        catalog = kedro_run("fit", **settings)
    assert "going on after epoch 2 of 3" in caplog.text
    assert catalog.load("training_history")["epoch"].tolist() == [1, 2, 3]
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("lumbarflow").experiment_id
    run, former = client.search_runs([experiment])  # the newest first
    assert [metric.step for metric in client.get_metric_history(former.info.run_id, "val_loss")] == [1, 2]
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "val_loss")] == [1, 2, 3]
    (folder,) = (project / "data/06_models/training").iterdir()
    record = catalog.load("training_record")
    assert record["weights"] == json.loads((folder / "training_record.json").read_text())["weights"]

    # Other settings are another training, beside the first.
    kedro_run("fit", **settings | {"training": {"epochs": 1}})
    assert len(list((project / "data/06_models/training").iterdir())) == 2


LABEL_TABLE = np.zeros(256, np.uint8)
LABEL_TABLE[1:26] = LABEL_TABLE[101:126] = 1
LABEL_TABLE[100] = 2
LABEL_TABLE[201:226] = 3
