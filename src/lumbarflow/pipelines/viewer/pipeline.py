from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from lumbarflow.pipelines.viewer.nodes import write_pages


def create_pipeline(**kwargs) -> Pipeline:
    """Pages in which people scroll through cases of the evaluation."""
    return pipeline(
        [
            node(
                write_pages,
                inputs=[
                    "predictions",
                    "ingested_series",
                    "metrics_by_case",
                    "model_input",
                    "training_record",
                    "evaluation_summary",
                    "params:viewer",
                ],
                outputs="viewer_pages",
                name="write_viewer_pages",
            ),
        ],
        tags="viewer",
    )
