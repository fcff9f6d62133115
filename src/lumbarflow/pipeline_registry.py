"""The pipelines by name."""

from __future__ import annotations

from types import ModuleType

from kedro.pipeline import Pipeline

from lumbarflow.pipelines import (
    apta_audit,
    baselines,
    download,
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
    viewer,
)


def _group(module: ModuleType) -> Pipeline:
    """The module's pipeline as a namespace of its name: one box in Kedro-Viz, and one word for `--namespaces`."""
    # Data sets keep their names: pipelines hand them on to each other.
    namespace = module.__name__.rpartition(".")[2]
    return Pipeline(module.create_pipeline(), namespace=namespace, prefix_datasets_with_namespace=False)


def register_pipelines() -> dict[str, Pipeline]:
    """Name -> pipeline. `train` is the main job, from raw volumes to a registered model."""
    steps = {
        "synthesize": _group(synthesize),
        "ingest": _group(ingest),
        "preprocess": _group(preprocess),
        "fit": _group(fit),
        "evaluate": _group(evaluate),
        "register": _group(register),
    }
    # Synthesizing comes first and does nothing when the raw scans are somebody's own.
    train = sum(steps.values(), Pipeline([]))
    checked = steps["synthesize"] + steps["ingest"]
    prepared = checked + steps["preprocess"]
    # Each of these starts from raw volumes as well; what is prepared already is only looked at.
    comparisons = {
        "leakage": prepared + _group(leakage),
        "baselines": prepared + _group(baselines),
        "tune": prepared + _group(tune),
        "evaluate_external": checked + _group(evaluate_external),
        "apta_audit": checked + _group(apta_audit),
        "export_nnunet": prepared + _group(export_nnunet),
        "screen": prepared + _group(screen),
        "recipes": prepared + _group(recipes),
    }
    others = {
        "download": _group(download),
        "predict": _group(predict),
        "report": _group(report),
        "rollback": _group(rollback),
        "viewer": _group(viewer),
    }
    return steps | comparisons | others | {"train": train, "__default__": train}
