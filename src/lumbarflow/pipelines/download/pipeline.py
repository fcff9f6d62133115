from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from lumbarflow.pipelines.download.nodes import fetch_files, unpack_files


def create_pipeline(**kwargs) -> Pipeline:
    """Fetch the public SPIDER record and lay it out where the other pipelines read raw scans."""
    return pipeline(
        [
            node(
                fetch_files,
                inputs=["params:download", "params:raw_dir", "params:synthetic_dir", "raw_folder"],
                outputs="fetched_files",
                name="fetch_files",
            ),
            node(
                unpack_files,
                inputs=["fetched_files", "params:download", "raw_folder"],
                outputs="download_record",
                name="unpack_files",
            ),
        ],
        tags="download",
    )
