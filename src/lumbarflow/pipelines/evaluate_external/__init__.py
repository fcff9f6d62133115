from lumbarflow.pipelines.evaluate_external.pipeline import create_pipeline

__all__ = ["create_pipeline"]
