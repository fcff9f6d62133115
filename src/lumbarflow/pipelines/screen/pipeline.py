from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from lumbarflow.pipelines.screen.nodes import plan_screen, predict_screen, score_screen, train_screen


def create_pipeline(**kwargs) -> Pipeline:
    """Train every row of the screen under one short budget, and compare their figures on the validation patients."""
    return pipeline(
        [
            node(
                plan_screen,
                inputs=[
                    "model_input",
                    "params:model",
                    "params:loss",
                    "params:training",
                    "params:augmentation",
                    "params:screen",
                ],
                outputs="screen_plan",
                name="plan_screen",
            ),
            node(
                train_screen,
                inputs=["screen_plan", "prepared_series", "training_folder", "params:screen"],
                outputs="screen_models",
                name="train_screen",
            ),
            node(
                predict_screen,
                inputs=["screen_plan", "screen_models", "prepared_series", "ingested_series", "params:evaluation"],
                outputs="screen_predictions",
                name="predict_screen",
            ),
            node(
                score_screen,
                inputs=[
                    "screen_plan",
                    "screen_models",
                    "screen_predictions",
                    "ingested_series",
                    "params:evaluation",
                    "params:screen",
                ],
                outputs=["screen_table", "screen_table_csv"],
                name="score_screen",
            ),
        ],
        tags="screen",
    )
