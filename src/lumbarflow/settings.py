"""Kedro's settings of this project."""

import logging

import kedro_mlflow  # noqa: F401  (sets its own log level when imported: first, so that ours holds)
from kedro.config import OmegaConfigLoader
from omegaconf.resolvers import oc

from lumbarflow.config import artifact_location, data_root, prepare_mlflow_ui, project_path, quiet_tools
from lumbarflow.hooks import RunHooks

logging.getLogger("kedro_mlflow").setLevel(logging.WARNING)
# Once more: the process of Kedro-Viz's server is started without Kedro's entry points.
quiet_tools()
prepare_mlflow_ui()

HOOKS = (RunHooks(),)

CONFIG_LOADER_CLASS = OmegaConfigLoader
CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    # An environment states only what differs from base: nested parameters are merged, not replaced.
    "merge_strategy": {"parameters": "soft", "globals": "soft"},
    "custom_resolvers": {
        "oc.env": oc.env,
        "data_root": data_root,
        "project": project_path,
        "artifact_location": artifact_location,
    },
}
