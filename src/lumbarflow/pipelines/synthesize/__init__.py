from lumbarflow.pipelines.synthesize.pipeline import create_pipeline

__all__ = ["create_pipeline"]
