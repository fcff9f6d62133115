"""Series worked on side by side leave the same files as one after the other, to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumbarflow import parallel
from lumbarflow.files import file_digest

WAYS = ({"workers": 1}, {"backend": "loky", "workers": 2}, {"backend": "threading", "workers": 2})


@pytest.fixture(autouse=True)
def processes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five small series would be done before any process is started."""
    monkeypatch.setattr(parallel, "SECONDS_WORTH_PROCESSES", 0.0)


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): file_digest([path]) for path in files}


def test_ingested_and_prepared_series_are_the_same_to_the_byte(raw, kedro_run, project):
    (raw / "masks/2_t2.nrrd").unlink()  # one is left out, and stays the only one
    found = []
    for way in WAYS:
        for pipeline in ("ingest", "preprocess"):
            kedro_run(pipeline, raw_dir=str(raw), parallel=way)
        stores = [project / "data/02_intermediate", project / "data/05_model_input"]
        found.append([digests(store) for store in stores])
        (project / "data").rename(project / f"data-{len(found)}")
    one_by_one, *side_by_side = found
    assert side_by_side == [one_by_one] * 2
    assert "series/1_t1/image.mha" in one_by_one[0] and "series/4_t2/images.npy" in one_by_one[1]


@pytest.mark.integration
@pytest.mark.usefixtures("quick_nets")
def test_masks_and_figures_of_a_dask_cluster_are_the_same_to_the_byte(raw, kedro_run, project):
    alone, dask = {"workers": 1}, {"backend": "dask", "workers": 2}
    folders = ("02_intermediate", "05_model_input", "07_model_output", "08_reporting")
    found = []
    for way in (alone, dask):
        for pipeline in ("ingest", "preprocess"):
            kedro_run(pipeline, raw_dir=str(raw), parallel=way)
        if way is alone:
            kedro_run("fit", raw_dir=str(raw), training={"epochs": 1})
        kedro_run("evaluate", raw_dir=str(raw), parallel=way, training={"epochs": 1})
        if way is alone:
            kedro_run("register", raw_dir=str(raw), training={"epochs": 1})
        output = project / f"masks-{len(found)}"
        kedro_run("predict", scans=str(raw / "images"), output=str(output), parallel=way)
        made = {name: digests(project / "data" / name) for name in folders}
        made["masks"] = {name: digest for name, digest in digests(output).items() if name.endswith((".gz", ".mha"))}
        for name in folders:
            (project / "data" / name).rename(project / f"{name}-{len(found)}")
        found.append(made)
    one_by_one, side_by_side = found
    for name in {"run_times.json"} | one_by_one["08_reporting"].keys() - side_by_side["08_reporting"].keys():
        del one_by_one["08_reporting"][name]  # of fit and register, which ran once; and how long a run took
    del side_by_side["08_reporting"]["run_times.json"]
    assert side_by_side == one_by_one
    assert {"metrics_by_case.csv", "overlays.png", "evaluation_summary.json"} <= side_by_side["08_reporting"].keys()
    assert len(one_by_one["masks"]) >= 2 and "predictions/4_t2/labels.mha" in one_by_one["07_model_output"]
