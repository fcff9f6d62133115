from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from lumbarflow.pipelines.export_nnunet.nodes import export_nnunet


def create_pipeline(**kwargs) -> Pipeline:
    """Write the split as a raw data set of nnU-Net v2."""
    return pipeline(
        [
            node(
                export_nnunet,
                inputs=["ingested_series", "split", "params:export_nnunet"],
                outputs="nnunet_dataset",
                name="export_nnunet",
            ),
        ],
        tags="export_nnunet",
    )
