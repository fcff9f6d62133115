from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from lumbarflow.pipelines.synthesize.nodes import synthesize_scans


def create_pipeline(**kwargs) -> Pipeline:
    """Write the synthetic cohort where the default raw scans are looked for."""
    return pipeline(
        [
            node(
                synthesize_scans,
                inputs=["params:synthesize", "params:raw_dir", "params:synthetic_dir"],
                outputs="raw_images@synthetic",
                name="synthesize_scans",
            ),
        ],
        tags="synthesize",
    )
