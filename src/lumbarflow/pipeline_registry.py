"""The pipelines by name."""

from __future__ import annotations

from kedro.pipeline import Pipeline

from lumbarflow.pipelines import evaluate, fit, ingest, preprocess, register, synthesize


def register_pipelines() -> dict[str, Pipeline]:
    """Name -> pipeline. `train` is the main job, from raw volumes to a registered model."""
    steps = {
        "synthesize": synthesize.create_pipeline(),
        "ingest": ingest.create_pipeline(),
        "preprocess": preprocess.create_pipeline(),
        "fit": fit.create_pipeline(),
        "evaluate": evaluate.create_pipeline(),
        "register": register.create_pipeline(),
    }
    # Synthesizing comes first and does nothing when the raw scans are somebody's own.
    train = sum(steps.values(), Pipeline([]))
    return steps | {"train": train, "__default__": train}
