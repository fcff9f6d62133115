from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from lumbarflow.pipelines.fit.nodes import train_model


def create_pipeline(**kwargs) -> Pipeline:
    """Train the modified U-Net."""
    return pipeline(
        [
            node(
                train_model,
                inputs=[
                    "model_input",
                    "params:model",
                    "params:loss",
                    "params:training",
                    "params:augmentation",
                    "training_folder",
                ],
                outputs=["model", "training_record", "training_history", "training_history_csv"],
                name="train_model",
            ),
        ],
        tags="fit",
    )
