from lumbarflow.pipelines.leakage.pipeline import create_pipeline

__all__ = ["create_pipeline"]
