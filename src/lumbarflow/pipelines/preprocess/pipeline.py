from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from lumbarflow.pipelines.preprocess.nodes import (
    compare_filter_rules,
    describe_model_input,
    index_slices,
    prepare_series,
    split_series,
)


def create_pipeline(**kwargs) -> Pipeline:
    """Split by patient, filter slices, and write the arrays that training reads."""
    return pipeline(
        [
            node(split_series, inputs=["series_index", "params:split"], outputs="split", name="split_series"),
            node(
                index_slices,
                inputs=["split", "ingested_series", "series_index", "params:filter"],
                outputs="slice_index",
                name="index_slices",
            ),
            node(
                compare_filter_rules,
                inputs=["slice_index", "params:filter"],
                outputs=["filter_rules", "filter_rules_csv"],
                name="compare_filter_rules",
            ),
            node(
                prepare_series,
                inputs=["ingested_series", "series_index", "params:preprocess"],
                outputs="prepared_series",
                name="prepare_series",
            ),
            node(
                describe_model_input,
                inputs=[
                    "prepared_series",
                    "series_index",
                    "slice_index",
                    "params:preprocess",
                    "params:split",
                    "params:filter",
                    "params:labels",
                ],
                outputs="model_input",
                name="describe_model_input",
            ),
        ],
        tags="preprocess",
    )
