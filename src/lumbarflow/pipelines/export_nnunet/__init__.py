from lumbarflow.pipelines.export_nnunet.pipeline import create_pipeline

__all__ = ["create_pipeline"]
