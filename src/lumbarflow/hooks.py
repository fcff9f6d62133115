"""What every run records about itself at its start and says at its end."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from typing import Any

from kedro.framework.hooks import hook_impl
from kedro.io import CatalogProtocol

from lumbarflow import tracking

logger = logging.getLogger(__name__)

# Catalog entries that a person would open next, in this order.
_TO_LOOK_AT = (
    "ingest_report_csv",
    "metrics_by_class_csv",
    "metrics_by_case_csv",
    "overlays_figure",
    "confusion_figure",
    "reliability_figure",
    "leakage_table_csv",
    "baselines_table_csv",
    "baselines_tests_csv",
    "tune_trials_csv",
    "screen_table_csv",
    "recipes_table_csv",
    "external_report_csv",
    "external_by_class_csv",
    "apta_audit_summary_csv",
    "comparison_csv",
    "scan_predictions",
    "scan_measurements",
    "report_html",
    "report_markdown",
)

_NEXT = {
    "ingest": "kedro run --pipeline=preprocess",
    "preprocess": "kedro run --pipeline=fit",
    "fit": "kedro run --pipeline=evaluate",
    "evaluate": "kedro run --pipeline=register",
    "leakage": "kedro run --pipeline=report",
    "baselines": "kedro run --pipeline=report",
}


RUN_TIMES = "run_times"
PARTIAL = ("tags", "from_nodes", "to_nodes", "node_names", "from_inputs", "to_outputs")


def _names(run_params: dict[str, Any]) -> list[str]:
    return run_params.get("pipeline_names") or [run_params.get("pipeline_name") or "__default__"]


class RunHooks:
    """Tag the MLflow run with the git commit; close the log with the figures, where they lie and what to do next."""

    def __init__(self) -> None:
        self._start = 0.0
        self._made: dict[str, Any] = {}
        self._commit: dict[str, str] = {}

    # Last, so that kedro-mlflow has opened its run.
    @hook_impl(trylast=True)
    def before_pipeline_run(self, run_params: dict[str, Any]) -> None:
        self._start = time.monotonic()
        self._made = {}
        self._commit = tracking.git_commit(str(run_params.get("project_path") or "."))
        tracking.tag_run(self._commit)

    @hook_impl
    def after_node_run(self, outputs: dict[str, Any]) -> None:
        # Only what the summary prints: keeping every output would keep the model and the stores alive.
        self._made |= {name: None for name in outputs}
        self._made |= {name: outputs[name] for name in ("evaluation_summary", "registration") if name in outputs}

    @hook_impl
    def after_pipeline_run(self, run_params: dict[str, Any], catalog: CatalogProtocol) -> None:
        for line in self._summary(run_params, catalog):
            logger.info(line)
        self._keep_time(run_params, catalog)

    def _keep_time(self, run_params: dict[str, Any], catalog: CatalogProtocol) -> None:
        """Add this run to the table of run times, where the report finds it."""
        # A part of a pipeline says nothing of how long the whole takes.
        if RUN_TIMES not in catalog or any(run_params.get(name) for name in PARTIAL):
            return
        dataset = catalog.get(RUN_TIMES)
        times = dataset.load() if dataset.exists() else {}
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        row = {"seconds": round(time.monotonic() - self._start, 1), "finished": finished}
        dataset.save(times | {" + ".join(_names(run_params)): row | self._commit})

    def _summary(self, run_params: dict[str, Any], catalog: CatalogProtocol) -> list[str]:
        names = _names(run_params)
        minutes, seconds = divmod(round(time.monotonic() - self._start), 60)
        lines = [f"--- {' + '.join(names)} finished in {minutes} min {seconds} s"]
        if evaluation := self._made.get("evaluation_summary"):
            lines.append(
                f"mean foreground Dice {evaluation['mean_foreground_dice']:.4f} on {evaluation['test_patients']} test "
                "patients ("
                + ", ".join(
                    f"{key.removeprefix('dice_')} {value:.4f}"
                    for key, value in evaluation.items()
                    if key.startswith("dice_") and key != "dice_background"
                )
                + ")"
            )
        if registration := self._made.get("registration"):
            holds = "holds" if registration["promoted"] else "does not hold"
            lines.append(
                f"registered as {registration['name']} version {registration['version']}, which {holds} the alias "
                f"{registration['alias']}: {registration['reason']}"
            )
        for name in _TO_LOOK_AT:
            if name in self._made:
                lines.append(f"see {getattr(catalog.get(name), '_filepath', name)}")
        environment = f" --env={run_params['env']}" if run_params.get("env") else ""
        if "registration" in self._made:
            lines.append(
                "next: kedro mlflow ui (runs, models), kedro viz run (the pipeline), kedro run --pipeline=report"
                f"{environment} (all figures on one page)"
            )
        elif names[-1] in _NEXT:
            lines.append(f"next: {_NEXT[names[-1]]}{environment} (with the same --params)")
        return lines
