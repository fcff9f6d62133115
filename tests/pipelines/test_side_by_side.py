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
