from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from lumbarflow.pipelines.tune.nodes import search_settings


def create_pipeline(**kwargs) -> Pipeline:
    """Search for better settings of the training; the parameters declare where."""
    return pipeline(
        [
            node(
                search_settings,
                inputs=[
                    "model_input",
                    "params:model",
                    "params:loss",
                    "params:training",
                    "params:augmentation",
                    "params:tune",
                    "tune_folder",
                ],
                outputs=["tune_trials", "tune_trials_csv", "tune_best"],
                name="search_settings",
            ),
        ],
        tags="tune",
    )
