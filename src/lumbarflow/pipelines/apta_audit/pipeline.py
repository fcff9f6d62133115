from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from lumbarflow.pipelines.apta_audit.nodes import audit_apta


def create_pipeline(**kwargs) -> Pipeline:
    """Compare the paper's APTA with the direct map, on the series that ingest accepted."""
    return pipeline(
        [
            node(
                audit_apta,
                inputs=["raw_masks", "ingested_series", "series_index", "params:labels"],
                outputs=["apta_audit", "apta_audit_summary", "apta_audit_summary_csv"],
                name="audit_apta",
            ),
        ],
        tags="apta_audit",
    )
