from lumbarflow.pipelines.apta_audit.pipeline import create_pipeline

__all__ = ["create_pipeline"]
