from lumbarflow.pipelines.download.pipeline import create_pipeline

__all__ = ["create_pipeline"]
