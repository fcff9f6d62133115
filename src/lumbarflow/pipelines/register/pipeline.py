from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from lumbarflow.pipelines.register.nodes import register_model


def create_pipeline(**kwargs) -> Pipeline:
    """Register the model, and move the champion's alias if the candidate may have it."""
    return pipeline(
        [
            node(
                register_model,
                inputs=[
                    "model",
                    "model_input",
                    "metrics_by_class",
                    "metrics_by_case",
                    "metrics_intervals",
                    "evaluation_summary",
                    "params:evaluation",
                    "params:registration",
                ],
                outputs="registration",
                name="register_model",
            ),
        ],
        tags="register",
    )
