"""What every run records about itself at its start and says at its end."""

from __future__ import annotations

import atexit
import contextlib
import logging
import re
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from kedro.config import MissingConfigException
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import CatalogProtocol, DatasetError
from kedro.pipeline.node import Node

from lumbarflow import storage, summary, tracking
from lumbarflow.parameters import check_lists, check_names
from lumbarflow.progress import duration

logger = logging.getLogger(__name__)

RUN_TIMES = "run_times"
PARTIAL = ("tags", "from_nodes", "to_nodes", "node_names", "from_inputs", "to_outputs", "namespaces")


def _names(run_params: dict[str, Any]) -> list[str]:
    """The pipelines of the run, in the order of their work: Kedro hands on a set of what the command names."""
    names = run_params.get("pipeline_names") or [run_params.get("pipeline_name") or "__default__"]
    names = ["train" if name == "__default__" else name for name in names]
    order = [*summary.NEXT, *sorted(set(names) - set(summary.NEXT))]
    return sorted(names, key=order.index)


def _is_part(run_params: dict[str, Any]) -> bool:
    return any(run_params.get(name) for name in PARTIAL)


def _address(dataset: Any) -> str:
    """Where an entry lies, "" if nowhere."""
    if folder := getattr(dataset, "_folder", None):
        return storage.joined(folder.address, dataset._name) if hasattr(dataset, "_name") else folder.address
    path = getattr(dataset, "_filepath", None) or getattr(dataset, "_path", None)
    protocol = getattr(dataset, "_protocol", "file")
    return "" if not path else str(path) if "://" in str(path) or protocol == "file" else f"{protocol}://{path}"


class RunHooks:
    """Tag the MLflow run with the git commit; close the log with what came out, where it lies and what to do next."""

    def __init__(self) -> None:
        self._commit: dict[str, str] = {}
        self._begin()

    def _begin(self) -> None:
        self._start = time.monotonic()
        self._step = ""
        self._made: dict[str, None] = {}
        self._loaded: dict[str, None] = {}
        # Entry -> words, see `summary`: keeping what the entries hold would keep the model and the stores alive.
        self._results: dict[str, str] = {}
        self._read: dict[str, str] = {}
        self._left_out: dict[str, str] = {}

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        loader = context.config_loader
        with contextlib.suppress(MissingConfigException):
            storage.set_credentials(loader["credentials"].get("storage") or {})
        if not loader.runtime_params:
            return
        text = "\n".join(p.read_text() for p in Path(loader.conf_source, loader.base_env).glob("parameters*.yml"))
        defaults, short = yaml.safe_load(text), re.findall(r"\$\{runtime_params:(\w+)", text)
        # Steps check the names in their sections; of a section that nobody takes, nobody would say a word.
        check_names(loader.runtime_params, sorted({*defaults, *short}), "--params")
        check_lists(loader.runtime_params, defaults)

    # Last, so that kedro-mlflow has opened its run.
    @hook_impl(trylast=True)
    def before_pipeline_run(self, run_params: dict[str, Any], catalog: CatalogProtocol) -> None:
        self._begin()
        # Kedro tells no hook of Ctrl+C. (At the end of the process MLflow ends its runs too, after this.)
        atexit.unregister(self._stopped)
        atexit.register(self._stopped, run_params, catalog)
        self._commit = tracking.git_commit(str(run_params.get("project_path") or "."))
        tracking.tag_run(self._commit)

    @hook_impl
    def before_dataset_loaded(self, node: Node) -> None:
        self._step = node.name

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        self._step = node.name

    @hook_impl
    def after_dataset_loaded(self, dataset_name: str, data: Any) -> None:
        self._loaded[dataset_name] = None
        # What this run has made itself it has not read.
        if dataset_name in summary.READ and dataset_name not in self._made:
            self._read[dataset_name] = summary.READ[dataset_name](data)
            self._note(summary.LEFT_OUT, self._left_out, dataset_name, data)

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any) -> None:
        self._made[dataset_name] = None
        self._note(summary.RESULTS, self._results, dataset_name, data)
        self._note(summary.LEFT_OUT, self._left_out, dataset_name, data)
        if dataset_name == summary.COHORT:
            self._note(summary.READ, self._read, dataset_name, data)

    @staticmethod
    def _note(words: dict[str, Any], noted: dict[str, str], dataset_name: str, data: Any) -> None:
        if dataset_name in words:
            noted[dataset_name] = words[dataset_name](data)

    @hook_impl
    def after_pipeline_run(self, run_params: dict[str, Any], catalog: CatalogProtocol) -> None:
        atexit.unregister(self._stopped)
        if failed := self._take_over(catalog):
            raise failed
        names, part = _names(run_params), _is_part(run_params)
        title = f"a part of {' + '.join(names)}" if part else " + ".join(names)
        logger.info("--- %s finished in %s", title, duration(time.monotonic() - self._start))
        lines = [*self._results.values(), *self._account(catalog)]
        if seen := [summary.shown(path) for path in self._paths(catalog, summary.TO_LOOK_AT)]:
            lines.append(f"see {', '.join(seen)}")
        options = summary.options(run_params.get("env"), run_params.get("runtime_params") or {})
        if part:
            lines.append(f"next: kedro run --pipelines={','.join(names)}{options} (the rest; what is done stays)")
        elif following := summary.next_step(names[-1], options, self._is_evaluated(catalog)):
            lines.append(f"next: {following}")
        for line in lines:
            logger.info(line)
        self._keep_time(run_params, catalog)

    @hook_impl
    def on_pipeline_error(self, run_params: dict[str, Any], catalog: CatalogProtocol) -> None:
        atexit.unregister(self._stopped)
        self._take_over(catalog)
        self._tell_of_a_part("failed", run_params, catalog, "do what the error below says, and ")

    def _stopped(self, run_params: dict[str, Any], catalog: CatalogProtocol) -> None:
        self._take_over(catalog)
        self._tell_of_a_part("stopped", run_params, catalog)
        tracking.end_killed()

    def _tell_of_a_part(
        self, ended: str, run_params: dict[str, Any], catalog: CatalogProtocol, before: str = ""
    ) -> None:
        where = f"in the step {self._step}" if self._step else "before its first step"
        names, after = " + ".join(_names(run_params)), duration(time.monotonic() - self._start)
        logger.error("--- %s %s after %s, %s; what was done until then is kept", names, ended, after, where)
        for line in self._account(catalog):
            logger.info(line)
        logger.info("next: %sgive the same command again, which goes on from there", before)

    def _take_over(self, catalog: CatalogProtocol) -> DatasetError | None:
        """Let other storage have what nodes wrote into copies of its folders, and return what failed.

        Kedro tells these data sets of no end.
        """
        from lumbarflow.datasets import FolderDataset  # and with it pandas: not for every command

        failed = None
        for dataset in (catalog.get(name) for name in self._loaded):
            try:
                if isinstance(dataset, FolderDataset):
                    dataset.release()
            except DatasetError as error:
                logger.error("%s", error.__cause__ or error)
                failed = failed or error
        return failed

    def _account(self, catalog: CatalogProtocol) -> list[str]:
        """What was read, left out and written, one line each; none about nothing."""
        left_out = []
        for name, words in self._left_out.items():
            reasons = [summary.shown(path) for path in self._paths(catalog, [summary.REASONS.get(name, "")])]
            left_out += [f"{words} (reasons: {reasons[0]})" if reasons else words] if words else []
        stores = {name: catalog.get(name) for name in self._made if hasattr(catalog.get(name), "updated")}
        worked = [(Path(_address(store)), store.unit, store.updated) for store in stores.values() if store.updated]
        others = self._paths(catalog, [name for name in self._made if name not in stores])
        account = {"read": self._read.values(), "left out": left_out, "written": summary.written(worked, others)}
        return [f"{title}: {', '.join(what)}" for title, words in account.items() if (what := [*filter(None, words)])]

    def _paths(self, catalog: CatalogProtocol, names: Iterable[str]) -> list[Path]:
        """Where those of the entries lie that this run has made: files, or folders of them."""
        found = (catalog.get(name) for name in names if name in self._made)
        return [Path(address) for dataset in found if (address := _address(dataset))]

    @staticmethod
    def _is_evaluated(catalog: CatalogProtocol) -> bool:
        return "evaluation_summary" in catalog and catalog.exists("evaluation_summary")

    def _keep_time(self, run_params: dict[str, Any], catalog: CatalogProtocol) -> None:
        """Add this run to the table of run times, where the report finds it."""
        # A part of a pipeline says nothing of how long the whole takes.
        if RUN_TIMES not in catalog or _is_part(run_params):
            return
        dataset = catalog.get(RUN_TIMES)
        times = dataset.load() if dataset.exists() else {}
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        row = {"seconds": round(time.monotonic() - self._start, 1), "finished": finished}
        dataset.save(times | {" + ".join(_names(run_params)): row | self._commit})
