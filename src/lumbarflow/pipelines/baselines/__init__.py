from lumbarflow.pipelines.baselines.pipeline import create_pipeline

__all__ = ["create_pipeline"]
