from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from lumbarflow.pipelines.evaluate_external.nodes import read_external, report_external, score_external


def create_pipeline(**kwargs) -> Pipeline:
    """Score a folder of somebody's masks against the ingested references."""
    return pipeline(
        [
            node(
                read_external,
                inputs=[
                    "external_masks",
                    "external_mask_digests",
                    "ingested_series",
                    "series_index",
                    "params:split",
                    "params:ingest",
                    "params:external",
                    "params:external_dir",
                ],
                outputs="external_series",
                name="read_external",
            ),
            node(
                report_external,
                inputs=["external_series", "params:external"],
                outputs=["external_report", "external_report_csv"],
                name="report_external",
            ),
            node(
                score_external,
                inputs=[
                    "external_series",
                    "ingested_series",
                    "external_report",
                    "series_index",
                    "params:labels",
                    "params:evaluation",
                    "params:external",
                ],
                outputs=[
                    "external_by_slice",
                    "external_by_case",
                    "external_by_case_csv",
                    "external_by_class",
                    "external_by_class_csv",
                    "external_intervals",
                    "external_intervals_csv",
                ],
                name="score_external",
            ),
        ],
        tags="evaluate_external",
    )
