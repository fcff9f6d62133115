from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from lumbarflow.pipelines.rollback.nodes import put_former_champion_back


def create_pipeline(**kwargs) -> Pipeline:
    """Put the former champion back."""
    return pipeline(
        [
            node(
                put_former_champion_back,
                inputs="params:registration",
                outputs="rollback",
                name="put_former_champion_back",
            ),
        ],
        tags="rollback",
    )
