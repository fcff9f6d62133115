"""From raw scans in any format to nnU-Net's folders and back to the raw grid, through Kedro."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import yaml
from kedro.io import DataCatalog, MemoryDataset
from kedro.runner import SequentialRunner

from lumbarflow.datasets.nnunet import NnunetDataset
from lumbarflow.imaging import LabelMap, geometry_differences, read_volume
from lumbarflow.pipelines.export_nnunet import create_pipeline
from lumbarflow.split import split_slices

CONF = Path(__file__).parents[2] / "conf/base"
SPLIT = {"method": "patient", "seed": 7, "validation_fraction": 0.25, "test_fraction": 0.25}
TOLERANCES = yaml.safe_load((CONF / "parameters_ingest.yml").read_text())["ingest"]["tolerances"]


@pytest.fixture
def ingested(raw, kedro_run):
    return kedro_run("ingest", raw_dir=str(raw))


@pytest.fixture
def export(ingested, tmp_path):
    """Run the pipeline alone, on ingested series and a split of theirs; returns folder and split."""
    settings = yaml.safe_load((CONF / "parameters_export_nnunet.yml").read_text())["export_nnunet"]

    def run(**changes):
        split = split_slices(ingested.load("series_index"), SPLIT | changes)
        catalog = DataCatalog(
            {
                "ingested_series": MemoryDataset(ingested.load("ingested_series"), copy_mode="assign"),
                "split": MemoryDataset(split),
                "params:export_nnunet": MemoryDataset(settings),
                "nnunet_dataset": NnunetDataset(path=str(tmp_path / "nnunet")),
            }
        )
        SequentialRunner().run(create_pipeline(), catalog)
        assert catalog.exists("nnunet_dataset")
        return tmp_path / "nnunet/nnUNet_raw/Dataset301_LumbarSpine", split

    return run


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_raw_scans_of_every_format_become_cases_on_their_own_grids(export, raw, caplog):
    with caplog.at_level(logging.INFO):
        folder, split = export()
    sides = split.groupby("series")["side"].first().to_dict()
    assert sorted(sides) == ["1_t1", "1_t2", "2_t2", "3_t2_SPACE", "4_t2"]
    for name, side in sides.items():
        part = "Ts" if side == "test" else "Tr"
        (source,) = [p for p in (raw / "images").iterdir() if p.name.startswith(f"{name}.") and p.suffix != ".zraw"]
        image, case = read_volume(source), read_volume(folder / f"images{part}/{name}_0000.nii.gz")
        assert np.array_equal(case.array, image.array)
        # What nnU-Net predicts has the geometry of its image: evaluation must find the raw one in it.
        assert geometry_differences(case, image, TOLERANCES) == []
        mask = read_volume(raw / "masks" / source.name, LabelMap).array
        labels = read_volume(folder / f"labels{part}/{name}.nii.gz", LabelMap).array
        assert np.array_equal(labels, np.select([mask == 1, mask == 100, mask == 201], [1, 2, 3], 0))
    (fold,) = json.loads((folder / "splits_final.json").read_text())
    for key, side in {"train": "train", "val": "validation"}.items():
        assert fold[key] == sorted(name for name, own in sides.items() if own == side)
    assert "README.txt beside nnUNet_raw has the commands" in caplog.text
    assert not any(record.getMessage().count("2_t2") for record in caplog.records if "nnunet" in record.name)


def test_another_split_moves_patients_and_writes_no_other_file(export, caplog):
    former, _ = export()
    before = {path.name: path.stat().st_mtime_ns for path in former.rglob("*.nii.gz")}
    parts = {path.name: path.parent.name[-2:] for path in former.rglob("*.nii.gz")}
    for seed in range(1, 20):
        folder, split = export(seed=seed)
        test = set(split.loc[split["side"] == "test", "series"])
        stand = {path.name: path.parent.name[-2:] for path in folder.rglob("*.nii.gz")}
        assert {name for name, part in stand.items() if part == "Ts"} == {
            name for series in test for name in (f"{series}.nii.gz", f"{series}_0000.nii.gz")
        }
        moved = {name for name in stand if stand[name] != parts[name]}
        if moved:
            break
    assert moved
    after = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.nii.gz")}
    assert {name for name in after if after[name] != before[name]} == moved


def test_a_slice_split_stops_before_anything_is_written(export, tmp_path):
    with pytest.raises(ValueError, match=r"series stand on several sides of the split \(split.method slice\)"):
        export(method="slice")
    assert not (tmp_path / "nnunet").exists()
