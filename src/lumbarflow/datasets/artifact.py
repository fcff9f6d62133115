"""What goes to MLflow as well as into a file."""

from __future__ import annotations

from typing import Any

from kedro_mlflow.io.artifacts import MlflowArtifactDataset

from lumbarflow.storage import folder_of


class ArtifactDataset(MlflowArtifactDataset):
    """kedro-mlflow's data set, also for files on another storage, which that takes for files of this machine.

    YAML:
        metrics_by_case_csv:
          type: lumbarflow.datasets.ArtifactDataset
          dataset:
            type: pandas.CSVDataset
            filepath: s3://bucket/08_reporting/metrics_by_case.csv
    """

    def __new__(cls, dataset: dict[str, Any], **options: Any) -> Any:
        made = super().__new__(cls, dataset, **options)
        if getattr(made, "_protocol", "file") == "file":
            return made
        kind = type(made)

        def save(self: Any, data: Any) -> None:
            _save(self, data, kind, dataset["filepath"])

        # kedro-mlflow knows its own by the name: Mlflow, and what it comes from.
        made.__class__ = type(f"Mlflow{kind.__name__}", (kind,), {"_save": save})
        return made


def _save(made: Any, data: Any, kind: type, address: str) -> None:
    """Save there, then give MLflow a copy of this machine."""
    import mlflow

    logs, made._logging_activated = made._logging_activated, False
    try:
        kind._save(made, data)
    finally:
        made._logging_activated = logs
    if logs:
        folder, name = folder_of(address)
        path = str(folder.pull([name]) / name)
        if made.run_id:
            mlflow.MlflowClient().log_artifact(made.run_id, path, made.artifact_path)
        else:
            mlflow.log_artifact(path, made.artifact_path)
