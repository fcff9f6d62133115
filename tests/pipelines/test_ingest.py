"""Ingest of whole folders, good and damaged, through Kedro."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pandas as pd
import pytest

from lumbarflow.imaging import LabelMap, Volume, read_volume, write_volume

COLUMNS = ["series", "file", "outcome", "found", "expected", "what_to_do"]


def report_of(catalog) -> pd.DataFrame:
    return catalog.load("ingest_report")


def test_every_series_of_a_good_folder_is_accepted_and_absent_rows_are_one_count(raw, kedro_run):
    catalog = kedro_run("ingest", raw_dir=str(raw))
    report, index = report_of(catalog), catalog.load("series_index")
    assert report.columns.tolist() == COLUMNS
    assert report["outcome"].value_counts().to_dict() == {"accepted": 5, "absent": 1}
    assert report[report["outcome"] == "absent"].iloc[0]["found"] == "1 rows of overview.csv have no files"
    assert index["series"].tolist() == ["1_t1", "1_t2", "2_t2", "3_t2_SPACE", "4_t2"]
    assert index["patient"].tolist() == ["1", "1", "2", "3", "4"]
    assert index["sequence"].tolist() == ["t1", "t2", "t2", "t2_SPACE", "t2"]
    assert index.loc[0, ["n_slices", "rows", "columns"]].tolist() == [4, 12, 10]
    assert index.loc[0, ["row_spacing_mm", "column_spacing_mm", "slice_spacing_mm"]].tolist() == [0.9, 0.7, 4.0]
    labels = catalog.load("ingested_series").label_map("1_t1", "labels.mha").array
    assert (labels[0, 2, 3], labels[0, 5, 3], labels[0, 5, 6], labels[0, 11, 9]) == (1, 3, 2, 0)


def test_each_damage_has_its_line_and_takes_no_other_series_down(raw, write_scan, kedro_run, caplog):
    for series in ("5_t2", "6_t2", "7_t2", "8_t2", "9_t2", "10_t2", "scan"):
        write_scan(raw, series)
    images, masks = raw / "images", raw / "masks"
    whole = (images / "5_t2.mha").read_bytes()
    (images / "5_t2.mha").write_bytes(whole[: len(whole) - 40])
    (masks / "6_t2.mha").unlink()
    (images / "7_t2.mha").unlink()
    mask = read_volume(masks / "8_t2.mha", LabelMap)
    mask.array[0, 0, 0] = 77
    write_volume(mask, masks / "8_t2.mha")
    write_volume(mask.with_array(np.zeros_like(mask.array)), masks / "9_t2.mha")
    image = read_volume(images / "10_t2.mha")
    write_volume(Volume(image.array, (0.7, 0.9, 4.4), image.origin_mm, image.direction), images / "10_t2.mha")
    (images / "notes.txt").write_text("not a scan")

    with caplog.at_level(logging.INFO):
        catalog = kedro_run("ingest", raw_dir=str(raw), ingest={"max_rejected_fraction": 0.6})
    report = report_of(catalog).set_index("file")
    assert report["outcome"].value_counts().to_dict() == {"accepted": 5, "rejected": 7, "ignored": 1, "absent": 1}
    expected = {
        "images/5_t2.mha": "end early",
        "images/6_t2.mha": "no file of that name in masks/",
        "masks/7_t2.mha": "no file of that name in images/",
        "masks/8_t2.mha": "unknown label ids [77]",
        "masks/9_t2.mha": "an empty mask",
        "masks/10_t2.mha": "spacing_mm (0.7 0.9 4) against (0.7 0.9 4.4) of the image",
        "images/scan.mha": "the name 'scan'",
        "images/notes.txt": "not a volume file",
    }
    for file, found in expected.items():
        assert found in report.loc[file, "found"]
    assert (report.loc[report["outcome"] == "rejected", "what_to_do"] != "").all()
    assert catalog.load("series_index")["series"].tolist() == ["1_t1", "1_t2", "2_t2", "3_t2_SPACE", "4_t2"]
    assert "5 series accepted, 7 rejected, 1 listed but not here" in caplog.text
    assert "left out masks/8_t2.mha" in caplog.text


def test_too_many_rejections_stop_the_run_after_the_report_is_written(raw, kedro_run, project):
    for name in ("1_t1.mha", "2_t2.nrrd"):
        (raw / "masks" / name).unlink()
    with pytest.raises(ValueError, match=r"2 of 5 series were rejected, more than ingest.max_rej\w+ \(0.2\)"):
        kedro_run("ingest", raw_dir=str(raw))
    report = pd.read_csv(project / "data/08_reporting/ingest_report.csv")
    assert (report["outcome"] == "rejected").sum() == 2


def test_nothing_accepted_stops_the_run(raw, kedro_run):
    shutil.rmtree(raw / "masks")
    with pytest.raises(ValueError, match=r"all 5 series were rejected"):
        kedro_run("ingest", raw_dir=str(raw), ingest={"max_rejected_fraction": 1.0})


def test_an_empty_folder_says_what_was_expected(tmp_path_factory, kedro_run):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match=r"no scans in images/ and masks/; expected the SPIDER layout.*raw_dir=DIR"):
        kedro_run("ingest", raw_dir=str(empty))


def test_a_folder_without_overview_is_split_by_its_patients(raw, kedro_run):
    (raw / "overview.csv").unlink()
    catalog = kedro_run("ingest", raw_dir=str(raw))
    report = report_of(catalog)
    assert (report["outcome"] == "accepted").all()
    assert report["found"].unique().tolist() == ["no row in overview.csv"]
    assert catalog.load("series_index")["subset"].unique().tolist() == [""]


def test_only_what_changed_is_done_again(raw, write_scan, kedro_run, caplog):
    with caplog.at_level(logging.INFO):
        kedro_run("ingest", raw_dir=str(raw))
        assert "ingest: 5 made, 0 unchanged" in caplog.text
        caplog.clear()
        kedro_run("ingest", raw_dir=str(raw))
        assert "ingest: 0 made, 5 unchanged" in caplog.text
        caplog.clear()
        write_scan(raw, "1_t1", seed=99)
        kedro_run("ingest", raw_dir=str(raw))
        assert "ingest: 1 made, 4 unchanged" in caplog.text
        caplog.clear()
        # Another label table concerns every series.
        kedro_run("ingest", raw_dir=str(raw), labels={"table": {"canal": [100, 150]}})
        assert "ingest: 5 made, 0 unchanged" in caplog.text


def test_an_interrupted_ingest_goes_on_where_it_was(raw, kedro_run, caplog, monkeypatch):
    from lumbarflow.pipelines.ingest import nodes

    ingest_scan = nodes.ingest_scan

    def interrupted(scan, *arguments):
        if scan.series == "2_t2":
            raise KeyboardInterrupt
        return ingest_scan(scan, *arguments)

    monkeypatch.setattr(nodes, "ingest_scan", interrupted)
    with pytest.raises(KeyboardInterrupt):  # in this process, whatever an earlier test has left running
        kedro_run("ingest", raw_dir=str(raw), parallel={"workers": 1})
    monkeypatch.undo()
    with caplog.at_level(logging.INFO):
        kedro_run("ingest", raw_dir=str(raw))
    assert "ingest: 3 made, 2 unchanged" in caplog.text


def test_one_sequence_alone_is_ingested_and_the_others_are_one_count(raw, kedro_run):
    catalog = kedro_run("ingest", raw_dir=str(raw), ingest={"only": "t2"})
    assert catalog.load("series_index")["series"].tolist() == ["1_t2", "2_t2", "4_t2"]
    ignored = catalog.load("ingest_report").query("outcome == 'ignored'")
    assert "2 series of other sequences" in set(ignored["found"])


def test_impossible_percentiles_are_no_series_fault(kedro_run, raw):
    with pytest.raises(ValueError, match=r"preprocess.percentiles is \[99.5, 0.5\]; expected two numbers from 0"):
        kedro_run("ingest", raw_dir=str(raw), preprocess={"percentiles": [99.5, 0.5]})
