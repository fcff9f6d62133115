from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from lumbarflow.pipelines.evaluate.nodes import draw_figures, predict_test, score_cases, score_paper_protocol


def create_pipeline(**kwargs) -> Pipeline:
    """Segment the test patients on their native grids and score them."""
    return pipeline(
        [
            node(
                predict_test,
                inputs=["model", "training_record", "model_input", "ingested_series", "params:evaluation"],
                outputs="predictions",
                name="predict_test",
            ),
            node(
                score_cases,
                inputs=[
                    "predictions",
                    "ingested_series",
                    "prepared_series",
                    "model_input",
                    "params:evaluation",
                    "params:paper_protocol",
                    "params:parallel",
                ],
                outputs=[
                    "metrics_by_slice",
                    "metrics_by_case",
                    "metrics_by_case_csv",
                    "metrics_by_class",
                    "metrics_by_class_csv",
                    "metrics_intervals",
                    "metrics_intervals_csv",
                    "reliability",
                    "reliability_csv",
                    "confusion_matrix",
                    "evaluation_summary",
                ],
                name="score_cases",
            ),
            node(
                score_paper_protocol,
                inputs=["model", "model_input", "params:evaluation", "params:paper_protocol"],
                outputs=["paper_metrics", "paper_metrics_csv"],
                name="score_paper_protocol",
            ),
            node(
                draw_figures,
                inputs=[
                    "predictions",
                    "ingested_series",
                    "metrics_by_case",
                    "model_input",
                    "confusion_matrix",
                    "reliability",
                ],
                outputs=["overlays_figure", "confusion_figure", "reliability_figure"],
                name="draw_figures",
            ),
        ],
        tags="evaluate",
    )
