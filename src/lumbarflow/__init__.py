"""lumbarflow: Kedro pipelines that segment lumbar spine MRI."""

import os

__version__ = "0.1.0"

# Nothing phones home. These are read when the libraries are imported, so they stand before any such import; a user's
# own setting wins only where it is at least as strict.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["KEDRO_DISABLE_TELEMETRY"] = "true"
