"""The registered model as MLflow runs it: the net and its preprocessing behind one `predict`.

MLflow executes this file to load the model ("models from code"): nothing of ours is pickled. It runs wherever the model
is pulled, with the recorded requirements and the copy of lumbarflow that travels beside it, so it must not need Kedro.
`lumbarflow.registry` logs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature, set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.types import ParamSchema, ParamSpec

from lumbarflow.files import read_json
from lumbarflow.inference import Segmenter

# The names by which `load_context` finds the files of the model.
NETWORK, SEGMENTER = "network", "segmenter"

OUTPUTS = ("labels", "probabilities")

# Parameters only: a tensor schema would refuse anything but arrays, and MLflow's own complaint about an array of the
# wrong shape prints the array. `predict` checks its input itself. A spacing cannot have a sensible default, but
# MLflow wants one for every parameter: an empty list stands for "not given".
SIGNATURE = ModelSignature(
    params=ParamSchema(
        [
            ParamSpec("pixel_spacing_mm", "double", [], shape=(-1,)),
            ParamSpec("output", "string", OUTPUTS[0]),
        ]
    )
)


class LumbarSegmenter(PythonModel):
    """Sagittal slices of one series in, classes on the same grid out."""

    def load_context(self, context: PythonModelContext) -> None:
        from lumbarflow.networks import load_model

        # A model registered before a setting came to be lacks it, and is served as it was evaluated: `EARLIER`.
        record = read_json(context.artifacts[SEGMENTER])
        self.segmenter = Segmenter(load_model(context.artifacts[NETWORK]), record["settings"])

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: Mapping[str, Any] | None = None
    ) -> np.ndarray:
        """Segment one series.

        Args:
            model_input: (n, rows, columns), all sagittal slices of one series (normalisation is over the series),
                from the patient's left to right (nets that take neighbouring slices depend on it), superior up and
                anterior left, raw intensities of any real dtype; nested lists as well.
            params: `pixel_spacing_mm`, [row, column] pixel size, required; `output`, one of OUTPUTS.
        Returns:
            uint8 (n, rows, columns) classes, or float32 (n, rows, columns, classes) probabilities.
        Raises:
            MlflowException: INVALID_PARAMETER_VALUE for any input that cannot be segmented, with what was found, what
                was expected and what to do. (Of other exceptions MLflow's server hides the message.)
        """
        given = dict(params or {})
        try:
            slices = _slices(model_input)
            spacing = _pixel_spacing_mm(given.get("pixel_spacing_mm"))
            segment = getattr(self.segmenter, _output(given.get("output", OUTPUTS[0])))
            return segment(slices, spacing)
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error


def _slices(model_input: Any) -> np.ndarray:
    expected = "expected an array (n, rows, columns) of the sagittal slices of one series"
    if not isinstance(model_input, (np.ndarray, list, tuple)):
        raise ValueError(
            f"the input is a {type(model_input).__name__}; {expected}. "
            "Read a file into an array first, e.g. with lumbarflow.imaging.read_volume and to_sagittal."
        )
    try:
        slices = np.asarray(model_input)
    except ValueError:
        raise ValueError(f"the input is a list of unequal rows; {expected}. Make all slices equally large.") from None
    if not (np.issubdtype(slices.dtype, np.integer) or np.issubdtype(slices.dtype, np.floating)):
        raise ValueError(
            f"the input holds values of type {slices.dtype}; {expected}, real numbers. "
            "Convert it, or read the file into an array first."
        )
    if slices.ndim != 3:
        raise ValueError(f"the input has the shape {slices.shape}; {expected}. Pass a single slice as slices[None].")
    return slices


def _pixel_spacing_mm(value: Any) -> tuple[float, float]:
    value = [] if value is None else list(value)
    if len(value) != 2:
        raise ValueError(
            f"pixel_spacing_mm is {value or 'missing'}; expected the pixel size [row, column] in mm. "
            'Pass it as predict(slices, params={"pixel_spacing_mm": [row, column]}).'
        )
    return float(value[0]), float(value[1])


def _output(value: Any) -> str:
    if value not in OUTPUTS:
        raise ValueError(f"output is {value!r}; expected one of {', '.join(OUTPUTS)}")
    return value


set_model(LumbarSegmenter())
