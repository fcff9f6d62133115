from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from lumbarflow.pipelines.ingest.nodes import index_series, ingest_series, report_ingest


def create_pipeline(**kwargs) -> Pipeline:
    """Check the raw series and turn them sagittal, with classes for labels."""
    return pipeline(
        [
            node(
                ingest_series,
                inputs=[
                    "raw_images@volumes",
                    "raw_masks",
                    "raw_image_digests",
                    "raw_mask_digests",
                    "raw_overview",
                    "params:ingest",
                    "params:labels",
                    "params:preprocess.percentiles",
                    "params:raw_dir",
                ],
                outputs="ingested_series",
                name="ingest_series",
            ),
            node(
                report_ingest,
                inputs=["ingested_series", "raw_image_digests", "raw_mask_digests", "raw_overview", "params:ingest"],
                outputs=["ingest_report", "ingest_report_csv"],
                name="report_ingest",
            ),
            node(
                index_series,
                inputs=["ingested_series", "ingest_report", "params:ingest"],
                outputs="series_index",
                name="index_series",
            ),
        ],
        tags="ingest",
    )
