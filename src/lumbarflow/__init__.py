"""lumbarflow: Kedro pipelines that segment lumbar spine MRI."""

import os

__version__ = "0.1.0"

# Nothing phones home. The libraries read these when they are imported, so they stand before any such import.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
# With a server that does not answer, commands that only look would retry for minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ["KEDRO_DISABLE_TELEMETRY"] = "true"
# Arrow's own allocator keeps what tables have freed: memory would grow with the cohort. The system's gives it back.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
