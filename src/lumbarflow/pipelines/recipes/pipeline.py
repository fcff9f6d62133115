from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from lumbarflow.pipelines.recipes.nodes import compare_recipes, plan_recipes
from lumbarflow.pipelines.runs import predict_runs, score_runs, train_runs


def create_pipeline(**kwargs) -> Pipeline:
    """Train recipes with several seeds each, and score them on the test patients."""
    return pipeline(
        [
            node(
                plan_recipes,
                inputs=[
                    "model_input",
                    "params:model",
                    "params:loss",
                    "params:training",
                    "params:augmentation",
                    "params:recipes",
                ],
                outputs="recipe_plan",
                name="plan_recipes",
            ),
            node(
                train_runs,
                inputs=["recipe_plan", "prepared_series", "training_folder"],
                outputs="recipe_models",
                name="train_recipes",
            ),
            node(
                predict_runs,
                inputs=["recipe_plan", "recipe_models", "prepared_series", "ingested_series", "params:evaluation"],
                outputs="recipe_predictions",
                name="predict_recipes",
            ),
            node(
                score_runs,
                inputs=["recipe_plan", "recipe_predictions", "ingested_series", "params:evaluation"],
                outputs=["recipes_by_case", "recipes_by_class", "recipes_intervals"],
                name="score_recipes",
            ),
            node(
                compare_recipes,
                inputs=["recipe_plan", "recipes_by_class"],
                outputs=["recipes_table", "recipes_table_csv"],
                name="compare_recipes",
            ),
        ],
        tags="recipes",
    )
