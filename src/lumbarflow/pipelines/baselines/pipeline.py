from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from lumbarflow.pipelines.baselines.nodes import compare_models, plan_baselines
from lumbarflow.pipelines.runs import predict_runs, score_runs, train_runs


def create_pipeline(**kwargs) -> Pipeline:
    """Train several models under one budget on the split at hand, and compare their figures."""
    return pipeline(
        [
            node(
                plan_baselines,
                inputs=[
                    "model_input",
                    "params:model",
                    "params:loss",
                    "params:training",
                    "params:augmentation",
                    "params:evaluation",
                    "params:baselines",
                ],
                outputs="baseline_plan",
                name="plan_baselines",
            ),
            node(
                train_runs,
                inputs=["baseline_plan", "prepared_series", "training_folder"],
                outputs="baseline_models",
                name="train_baselines",
            ),
            node(
                predict_runs,
                inputs=[
                    "baseline_plan",
                    "baseline_models",
                    "prepared_series",
                    "ingested_series",
                    "params:evaluation",
                ],
                outputs="baseline_predictions",
                name="predict_baselines",
            ),
            node(
                score_runs,
                inputs=["baseline_plan", "baseline_predictions", "ingested_series", "params:evaluation"],
                outputs=["baseline_by_case", "baseline_by_class", "baseline_intervals"],
                name="score_baselines",
            ),
            node(
                compare_models,
                inputs=[
                    "baseline_plan",
                    "baseline_models",
                    "baseline_by_case",
                    "baseline_by_class",
                    "baseline_intervals",
                    "params:baselines",
                ],
                outputs=["baselines_table", "baselines_table_csv", "baselines_tests", "baselines_tests_csv"],
                name="compare_models",
            ),
        ],
        tags="baselines",
    )
