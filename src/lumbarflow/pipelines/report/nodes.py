"""One report of everything that the run at hand has left, as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from lumbarflow import figures, report
from lumbarflow.cohort import ACCEPTED
from lumbarflow.figures import png
from lumbarflow.model_input import ModelInput
from lumbarflow.parameters import check_names
from lumbarflow.pipelines.evaluate.nodes import choose_overlays
from lumbarflow.preparation import data_hash, labels_digest, split_hash
from lumbarflow.provenance import check_cohort, check_evaluation, check_labels, unmarked_if_of
from lumbarflow.store import SeriesStore
from lumbarflow.viewer import model_of


def compare_with_published(
    by_class: pd.DataFrame,
    intervals: pd.DataFrame,
    paper_metrics: pd.DataFrame,
    model_input: ModelInput,
    summary: dict[str, Any],
    training_record: dict[str, Any],
    series_index: pd.DataFrame,
    slice_index: pd.DataFrame,
    settings: dict[str, Any],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Our rows, the paper's and the published baselines' in one table (twice: for machines and for people)."""
    manifest = model_input.manifest
    # The first step of the report: what does not belong together stops here.
    check_evaluation(summary, training_record["weights"], manifest)
    check_labels(series_index, labels_digest(manifest["settings"]["labels"]))
    check_cohort(data_hash(series_index, manifest["settings"]["labels"]), split_hash(slice_index), manifest)
    check_names(settings, ("published",), "report")
    check_names(settings["published"], ("paper", "baselines"), "report.published")
    paper = settings["published"]["paper"]
    table = report.comparison_table(
        by_class,
        intervals,
        paper_metrics,
        summary["settings"]["paper_protocol"],
        [{"source": paper["source"], "caveat": paper["protocol"]} | row for row in paper["rows"]],
        settings["published"]["baselines"],
        manifest,
    )
    return table, table


def write_report(
    ingest_report: pd.DataFrame,
    series_index: pd.DataFrame,
    split: pd.DataFrame,
    slice_index: pd.DataFrame,
    filter_rules: pd.DataFrame,
    model_input: ModelInput,
    training_record: dict[str, Any],
    history: pd.DataFrame,
    predictions: SeriesStore,
    series: SeriesStore,
    by_case: pd.DataFrame,
    by_class: pd.DataFrame,
    intervals: pd.DataFrame,
    confusion: dict[str, Any],
    reliability: pd.DataFrame,
    summary: dict[str, Any],
    comparison: pd.DataFrame,
    run_times: dict[str, Any],
    leakage: pd.DataFrame,
    baselines: pd.DataFrame,
    baseline_tests: pd.DataFrame,
    external: pd.DataFrame,
    external_report: pd.DataFrame,
    apta_audit: pd.DataFrame,
    viewer_pages: dict[str, Callable[[], str]],
) -> tuple[Any, ...]:
    """The report as HTML and Markdown, then its pictures; what optional pipelines make is in it once they have run."""
    manifest = model_input.manifest
    leakage, baselines, baseline_tests, external, apta_audit = (
        unmarked_if_of(table, manifest) for table in (leakage, baselines, baseline_tests, external, apta_audit)
    )
    overlays, chosen = choose_overlays(predictions, series, by_case, model_input)
    curves, cases = figures.training_curves(history), figures.case_distribution(by_case)
    compared, shown = figures.comparison_figure(comparison), figures.overlay_figure(overlays)
    shares, believed = figures.confusion_figure(np.array(confusion["counts"])), figures.reliability_figure(reliability)
    left_out = external_report[external_report["outcome"] != ACCEPTED] if len(external_report) else external_report
    title = "lumbarflow: segmentation of the lumbar spine on MRI"
    sections = [
        report.summary_section(by_class, intervals, manifest),
        report.cohort_section(ingest_report, series_index, slice_index, filter_rules),
        report.split_section(split, series_index, manifest),
        report.metrics_section(by_class, intervals),
        report.comparison_section(comparison, png(compared)),
        report.baselines_section(baselines, baseline_tests),
        report.leakage_section(leakage),
        report.training_section(history, training_record, png(curves)),
        report.confusion_section(confusion, png(shares)),
        report.reliability_section(reliability, png(believed)),
        report.cases_section(by_case, png(cases)),
        report.overlays_section(chosen, png(shown, dpi=100)),
        report.viewer_section(_pages(viewer_pages, training_record["weights"])),
        report.ceiling_section(by_class, manifest),
        report.external_section(external, left_out),
        report.apta_section(apta_audit),
        report.hardware_section(training_record, _run_times(run_times)),
        report.provenance_section(manifest, training_record, summary["settings"] | _commit(summary)),
    ]
    documents = report.to_html(title, sections), report.to_markdown(title, sections)
    return (*documents, curves, cases, compared, shown, shares, believed)


def _pages(pages: dict[str, Callable[[], str]], weights: str) -> list[str]:
    """The cases whose page shows the prediction of these weights; older pages lie beside them."""
    # Other files may lie there too, such as somebody's screenshots.
    loads = {file.removesuffix(".html"): load for file, load in sorted(pages.items()) if file.endswith(".html")}
    return [name for name, load in loads.items() if model_of(load()) == weights]


def _commit(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: summary[name] for name in ("git_commit", "git_changed") if name in summary}


def _run_times(run_times: dict[str, Any]) -> pd.DataFrame:
    rows = [{"pipeline": name} | row for name, row in run_times.items() if name != "report"]
    return pd.DataFrame(rows, columns=["pipeline", "seconds", "finished", "git_commit", "git_changed"])
