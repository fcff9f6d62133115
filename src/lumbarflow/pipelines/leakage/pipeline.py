from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from lumbarflow.pipelines.leakage.nodes import compare_splits, plan_leakage
from lumbarflow.pipelines.runs import predict_runs, score_runs, train_runs


def create_pipeline(**kwargs) -> Pipeline:
    """Train one net under the split by slice and under the split by patient, and compare their figures."""
    return pipeline(
        [
            node(
                plan_leakage,
                inputs=[
                    "prepared_series",
                    "ingested_series",
                    "series_index",
                    "params:preprocess",
                    "params:split",
                    "params:filter",
                    "params:labels",
                    "params:model",
                    "params:loss",
                    "params:training",
                    "params:augmentation",
                    "params:evaluation",
                    "params:leakage",
                ],
                outputs="leakage_plan",
                name="plan_leakage",
            ),
            node(
                train_runs,
                inputs=["leakage_plan", "prepared_series", "training_folder"],
                outputs="leakage_models",
                name="train_leakage_runs",
            ),
            node(
                predict_runs,
                inputs=[
                    "leakage_plan",
                    "leakage_models",
                    "prepared_series",
                    "ingested_series",
                    "params:evaluation",
                ],
                outputs="leakage_predictions",
                name="predict_leakage_runs",
            ),
            node(
                score_runs,
                inputs=["leakage_plan", "leakage_predictions", "ingested_series", "params:evaluation"],
                outputs=["leakage_by_case", "leakage_by_class", "leakage_intervals"],
                name="score_leakage_runs",
            ),
            node(
                compare_splits,
                inputs=["leakage_plan", "leakage_by_class", "leakage_intervals", "params:leakage"],
                outputs=["leakage_table", "leakage_table_csv"],
                name="compare_splits",
            ),
        ],
        tags="leakage",
    )
