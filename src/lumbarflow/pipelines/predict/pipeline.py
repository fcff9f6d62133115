from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from lumbarflow.pipelines.predict.nodes import check_predictions, plan_predictions, tabulate_predictions


def create_pipeline(**kwargs) -> Pipeline:
    """Segment and measure every scan below a folder with a model of the registry."""
    return pipeline(
        [
            node(
                plan_predictions,
                inputs=["scans", "registered_model", "prediction_folder", "params:predict"],
                outputs=["segmentations", "prediction_index"],
                name="segment_scans",
            ),
            node(
                tabulate_predictions,
                inputs=["segmentations", "prediction_index"],
                outputs=["scan_predictions", "scan_measurements"],
                name="tabulate_predictions",
            ),
            node(
                check_predictions,
                inputs=["scan_predictions", "prediction_index"],
                outputs=None,
                name="check_predictions",
            ),
        ],
        tags="predict",
    )
