from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from lumbarflow.pipelines.report.nodes import compare_with_published, write_report


def create_pipeline(**kwargs) -> Pipeline:
    """Compare with the paper and the literature, and write the report."""
    return pipeline(
        [
            node(
                compare_with_published,
                inputs=[
                    "metrics_by_class",
                    "metrics_intervals",
                    "paper_metrics",
                    "model_input",
                    "evaluation_summary",
                    "training_record",
                    "series_index",
                    "slice_index",
                    "params:report",
                ],
                outputs=["comparison", "comparison_csv"],
                name="compare_with_published",
            ),
            node(
                write_report,
                inputs=[
                    "ingest_report",
                    "series_index",
                    "split",
                    "slice_index",
                    "filter_rules",
                    "model_input",
                    "training_record",
                    "training_history",
                    "predictions",
                    "ingested_series",
                    "metrics_by_case",
                    "metrics_by_class",
                    "metrics_intervals",
                    "confusion_matrix",
                    "reliability",
                    "evaluation_summary",
                    "comparison",
                    "run_times",
                    "leakage_table_csv",
                    "baselines_table_csv",
                    "baselines_tests_csv",
                    "external_by_class_csv",
                    "external_report_csv",
                    "apta_audit_summary_csv",
                    "viewer_pages",
                ],
                outputs=[
                    "report_html",
                    "report_markdown",
                    "training_figure",
                    "cases_figure",
                    "comparison_figure",
                    # Drawn by evaluate too; here once more, so that the MLflow run of the report has all its pictures.
                    "overlays_figure",
                    "confusion_figure",
                    "reliability_figure",
                ],
                name="write_report",
            ),
        ],
        tags="report",
    )
