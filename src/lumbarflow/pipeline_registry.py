"""The pipelines by name."""

from __future__ import annotations

from kedro.pipeline import Pipeline

from lumbarflow.pipelines import (
    apta_audit,
    baselines,
    evaluate,
    evaluate_external,
    export_nnunet,
    fit,
    ingest,
    leakage,
    predict,
    preprocess,
    recipes,
    register,
    report,
    rollback,
    screen,
    synthesize,
    tune,
)


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
    checked = steps["synthesize"] + steps["ingest"]
    prepared = checked + steps["preprocess"]
    # Each of these starts from raw volumes as well; what is prepared already is only looked at.
    comparisons = {
        "leakage": prepared + leakage.create_pipeline(),
        "baselines": prepared + baselines.create_pipeline(),
        "tune": prepared + tune.create_pipeline(),
        "evaluate_external": checked + evaluate_external.create_pipeline(),
        "apta_audit": checked + apta_audit.create_pipeline(),
        "export_nnunet": prepared + export_nnunet.create_pipeline(),
        "screen": prepared + screen.create_pipeline(),
        "recipes": prepared + recipes.create_pipeline(),
    }
    others = {
        "predict": predict.create_pipeline(),
        "report": report.create_pipeline(),
        "rollback": rollback.create_pipeline(),
    }
    return steps | comparisons | others | {"train": train, "__default__": train}
