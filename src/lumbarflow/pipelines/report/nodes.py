"""One report of everything that the run at hand has left, as HTML and as Markdown."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lumbarflow import figures, report, tracking
from lumbarflow.figures import png
from lumbarflow.model_input import ModelInput
from lumbarflow.parameters import check_names
from lumbarflow.pipelines.evaluate.nodes import choose_overlays
from lumbarflow.provenance import check_evaluation, unmarked_if_of
from lumbarflow.store import SeriesStore


def compare_with_published(
    by_class: pd.DataFrame,
    intervals: pd.DataFrame,
    paper_metrics: pd.DataFrame,
    model_input: ModelInput,
    protocol: dict[str, Any],
    settings: dict[str, Any],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Our rows, the paper's and the published baselines' in one table (twice: for machines and for people)."""
    check_names(settings, ("published",), "report")
    check_names(settings["published"], ("paper", "baselines"), "report.published")
    paper = settings["published"]["paper"]
    table = report.comparison_table(
        by_class,
        intervals,
        paper_metrics,
        protocol,
        [{"source": paper["source"], "caveat": paper["protocol"]} | row for row in paper["rows"]],
        settings["published"]["baselines"],
        model_input.manifest,
    )
    return table, table


def draw_report_figures(history: pd.DataFrame, by_case: pd.DataFrame, comparison: pd.DataFrame) -> tuple[Any, Any, Any]:
    """Training curves, the cases' figures, and the comparison."""
    return figures.training_curves(history), figures.case_distribution(by_case), figures.comparison_figure(comparison)


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
    summary: dict[str, Any],
    comparison: pd.DataFrame,
    run_times: dict[str, Any],
    leakage: pd.DataFrame,
    baselines: pd.DataFrame,
    baseline_tests: pd.DataFrame,
    external: pd.DataFrame,
    apta_audit: pd.DataFrame,
    parameters: dict[str, Any],
) -> tuple[str, str]:
    """The report as HTML and as Markdown; what optional pipelines make is in it once they have run."""
    check_evaluation(summary, training_record["weights"], model_input.manifest)
    manifest = model_input.manifest
    leakage, baselines, baseline_tests, external, apta_audit = (
        unmarked_if_of(table, manifest) for table in (leakage, baselines, baseline_tests, external, apta_audit)
    )
    overlays, chosen = choose_overlays(predictions, series, by_case, model_input)
    curves, cases, compared = draw_report_figures(history, by_case, comparison)
    title = "lumbarflow: segmentation of the lumbar spine on MRI"
    sections = [
        report.summary_section(by_class, intervals, split, manifest),
        report.cohort_section(ingest_report, series_index, slice_index, filter_rules),
        report.split_section(split, series_index, manifest),
        report.metrics_section(by_class, intervals),
        report.comparison_section(comparison, png(compared)),
        report.baselines_section(baselines, baseline_tests),
        report.leakage_section(leakage),
        report.training_section(history, training_record, png(curves)),
        report.confusion_section(confusion, png(figures.confusion_figure(np.array(confusion["counts"])))),
        report.cases_section(by_case, png(cases)),
        report.overlays_section(chosen, png(figures.overlay_figure(overlays), dpi=100)),
        report.ceiling_section(by_class, manifest),
        report.external_section(external),
        report.apta_section(apta_audit),
        report.hardware_section(training_record, _run_times(run_times)),
        report.provenance_section(manifest, tracking.git_commit("."), parameters),
    ]
    return report.to_html(title, sections), report.to_markdown(title, sections)


def _run_times(run_times: dict[str, Any]) -> pd.DataFrame:
    rows = [{"pipeline": name} | row for name, row in run_times.items()]
    return pd.DataFrame(rows, columns=["pipeline", "seconds", "finished", "git_commit"])
