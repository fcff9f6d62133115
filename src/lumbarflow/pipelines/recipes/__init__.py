from lumbarflow.pipelines.recipes.pipeline import create_pipeline

__all__ = ["create_pipeline"]
