"""The registered model as MLflow runs it: the net and its preprocessing behind one `predict`.

MLflow executes this file to load the model ("models from code"): nothing of ours is pickled. It runs wherever the model
is pulled, with the recorded requirements and the copy of lumbarflow that travels beside it, so it must not need Kedro.
`lumbarflow.registry` logs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature, set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.types import ParamSchema, ParamSpec

from lumbarflow.files import read_json

if TYPE_CHECKING:
    from lumbarflow.inference import Segmenter

# The names by which `load_context` finds the files of the model.
NETWORK, SEGMENTER = "network", "segmenter"

OUTPUTS = ("labels", "probabilities")

# The folder that a server's clients may name scans in, and where they may have masks written.
ALLOWED_FOLDER = "LUMBARFLOW_ALLOWED_FOLDER"
# MLflow's server of a model, and the variable that it is told its model by: where these are, somebody else asks.
_SERVER_MODULE, _SERVER_MODEL = "mlflow.pyfunc.scoring_server.app", "__pyfunc_model_path__"

# Parameters only: a tensor schema would refuse anything but arrays, and MLflow's own complaint about an array of the
# wrong shape prints the array. `predict` checks its input itself. A spacing cannot have a sensible default, but
# MLflow wants one for every parameter: an empty list stands for "not given".
SIGNATURE = ModelSignature(
    params=ParamSchema(
        [
            ParamSpec("pixel_spacing_mm", "double", [], shape=(-1,)),
            ParamSpec("output", "string", OUTPUTS[0]),
            ParamSpec("labels", "string", "classes"),
            ParamSpec("test_time_augmentation", "string", "as_evaluated"),
            ParamSpec("output_path", "string", ""),
            ParamSpec("overwrite", "boolean", False),
        ]
    )
)


class LumbarSegmenter(PythonModel):
    """Scans, or the sagittal slices of one, in; classes on the same grid out."""

    def load_context(self, context: PythonModelContext) -> None:
        from lumbarflow.inference import Segmenter

        # A model registered before a setting came to be lacks it, and is served as it was evaluated: `EARLIER`.
        self.record = read_json(context.artifacts[SEGMENTER])
        self.segmenter = Segmenter(_network(context.artifacts[NETWORK]), self.record["settings"])

    # Paths come as well; but of any other hint, and of none, MLflow warns whenever the model is loaded.
    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: Mapping[str, Any] | None = None
    ) -> np.ndarray | dict[str, Any] | list[dict[str, Any]]:
        """Segment one series of slices, one volume, or several.

        Args:
            model_input: (n, rows, columns), all sagittal slices of one series (normalisation is over the series),
                from the patient's left to right (nets that take neighbouring slices depend on it), superior up and
                anterior left, raw intensities of any real dtype; nested lists as well. Or the path of a volume
                (`.mha .mhd .nii .nii.gz .nrrd`) or of a folder with one DICOM series, in any orientation; or a list of
                such paths.
            params:
                `output`: one of OUTPUTS.
                `test_time_augmentation`: "as_evaluated" (with the registered figures), "on" or "off".
                For slices: `pixel_spacing_mm`, [row, column] pixel size, required.
                For volumes: `labels`, "classes" (1 vertebrae, 2 canal, 3 IVD) or "instances" (SPIDER's: vertebrae 1..
                from the lowest up, canal 100, discs 201..); `output_path`, a file, or a folder for
                `<name>_seg.<format of the scan, .nii.gz for DICOM>`; `overwrite` what is there.
        Returns:
            Of slices uint8 (n, rows, columns) classes, or float32 (n, rows, columns, classes) probabilities.
            Of a volume a dictionary: `path`; `labels`, uint8 (z, y, x) on the volume's own grid in its file's order, or
            `probabilities`, float32 (z, y, x, classes); `spacing_mm` and `origin_mm` (x, y, z), `direction` (3 x 3),
            all as SimpleITK has them; `warnings`. With `output_path`, `written` is the file's path instead of the
            array. Of a list of paths a list of these; one that cannot be segmented has `error` instead, and the others
            go on.
        Raises:
            MlflowException: INVALID_PARAMETER_VALUE for any input that cannot be segmented, with what was found, what
                was expected and what to do. (Of other exceptions MLflow's server hides the message.)
        """
        given = {parameter.name: parameter.default for parameter in SIGNATURE.params} | dict(params or {})
        try:
            if given["output"] not in OUTPUTS:
                raise ValueError(f"output is {given['output']!r}; expected one of {', '.join(OUTPUTS)}")
            paths = _paths(model_input)
            if paths is None:
                return self._predict_slices(model_input, given)
            if isinstance(paths, str):
                return self._predict_volume(paths, given, alone=True)
            if given["output_path"]:
                _check_names_differ(paths)
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return [self._predict_or_say_why(path, given) for path in paths]

    def _predict_slices(self, model_input: Any, given: Mapping[str, Any]) -> np.ndarray:
        if only := [name for name in ("output_path", "overwrite") if given[name]]:
            raise ValueError(f"{only[0]} is for volumes; expected none with an array. Write the result yourself.")
        if given["labels"] != "classes":
            raise ValueError(f"labels is {given['labels']!r}; expected 'classes' with an array. Pass a volume's path.")
        slices = _slices(model_input)
        spacing = _pixel_spacing_mm(given["pixel_spacing_mm"])
        return getattr(self._augmented(given), given["output"])(slices, spacing)

    def _predict_or_say_why(self, path: str, given: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return self._predict_volume(path, given, alone=False)
        except ValueError as error:
            return {"path": path, "error": str(error)}

    def _predict_volume(self, path: str, given: Mapping[str, Any], alone: bool) -> dict[str, Any]:
        from lumbarflow.prediction import problem_of

        try:
            return self._volume(path, given, alone)
        except ValueError:
            raise
        except Exception as error:  # no room for the mask, say: to the server's client it is like any other fault
            raise problem_of(path, error) from error

    def _volume(self, path: str, given: Mapping[str, Any], alone: bool) -> dict[str, Any]:
        from lumbarflow import prediction, scans
        from lumbarflow.imaging import write_channels, write_volume, written_files

        if given["labels"] not in prediction.LABELS:
            raise ValueError(f"labels is {given['labels']!r}; expected one of {', '.join(prediction.LABELS)}")
        segmenter = self._augmented(given)
        # Within: a link among the files of a volume must not lead out of it either.
        source = scans.scan_at(_allowed(path), within=os.environ.get(ALLOWED_FOLDER) or None)
        target = None
        if given["output_path"]:
            target = _allowed(str(_target(_allowed(given["output_path"]), source, alone)))
            there = [file for file in written_files(target) if file.exists()]
            if there and not given["overwrite"]:
                raise ValueError(
                    f"{there[0]} is there already; expected a new file. Name another output_path, or pass "
                    "overwrite=True."
                )
        image = scans.read_scan(source)
        result: dict[str, Any] = {"path": path}
        if given["output"] == "labels":
            done = prediction.segment_volume(segmenter, image.volume)
            numbered = done.instances() if given["labels"] == "instances" else done.classes
            delivered = done.restore(numbered.array)
            values = delivered.array
            write = partial(write_volume, delivered)
        else:
            values = prediction.probabilities(segmenter, image.volume)
            write = partial(write_channels, values, image.volume)
        if target is None:
            result[given["output"]] = values
        else:
            write(target)
            result["written"] = str(target)
        return result | {
            "spacing_mm": list(image.volume.spacing_mm),
            "origin_mm": list(image.volume.origin_mm),
            "direction": image.volume.direction.tolist(),
            "warnings": list(image.warnings),
        }

    def _augmented(self, given: Mapping[str, Any]) -> Segmenter:
        from lumbarflow.prediction import choose_augmentation

        return choose_augmentation(self.segmenter, given["test_time_augmentation"])


def _network(path: str) -> Any:
    """What computes: ONNX Runtime, or Keras for nets that ONNX cannot express, and for those registered earlier."""
    if Path(path).suffix == ".onnx":
        from lumbarflow.onnx_network import OnnxNetwork

        return OnnxNetwork(path)
    from lumbarflow.networks import load_model

    return load_model(path)


def _paths(model_input: Any) -> str | list[str] | None:
    """The paths that an input consists of, None if it is something else. From a server they come as an array too."""
    if isinstance(model_input, (str, Path)):
        return str(model_input)
    if isinstance(model_input, np.ndarray) and model_input.dtype.kind in "US":
        return str(model_input) if model_input.ndim == 0 else [str(path) for path in model_input.ravel()]
    several = isinstance(model_input, (list, tuple)) and len(model_input) > 0
    if several and all(isinstance(path, (str, Path)) for path in model_input):
        return [str(path) for path in model_input]
    return None


def _allowed(path: str) -> Path:
    """The path, if whoever asks may name it: at home any, through a server those in its allowed folder.

    Raises:
        ValueError: outside of it; links are followed first. It does not tell whether there is such a file.
    """
    folder = os.environ.get(ALLOWED_FOLDER)
    if not folder:
        if _SERVER_MODULE in sys.modules or _SERVER_MODEL in os.environ:
            raise ValueError(
                f"this server reads and writes no files; expected an array. To let it, set {ALLOWED_FOLDER} to the one "
                "folder that it may use, where it is started."
            )
        return Path(path)
    # (Path.resolve raises for links in a circle.)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(
            f"{path} is not in the allowed folder; expected a path in {folder}. Copy the scan there, or start the "
            f"server with another {ALLOWED_FOLDER}."
        )
    return Path(path)


def _check_names_differ(paths: list[str]) -> None:
    """Masks of several scans go to one folder. Raises ValueError if two would have the same name there."""
    from lumbarflow.imaging import split_volume_name

    names = []
    for path in paths:
        stem, suffix = split_volume_name(Path(os.path.abspath(path)).name)
        # As `scans.scan_at` names them: endings in small letters, and DICOM's only series.
        names.append(f"{stem}{suffix.lower()}" if suffix else f"{stem}_1.nii.gz")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"{names.count(twice[0])} of the scans are called {twice[0]}; expected names that differ, since all "
            "masks go to one output_path. Ask for them one by one, or without output_path."
        )


def _target(output: Path, source: Any, alone: bool) -> Path:
    """The file that a mask is written to. Raises ValueError if the path is no file's where only a file will do."""
    from lumbarflow.imaging import split_volume_name

    name = Path(source.mask_name).name
    if output.is_dir() or not alone:
        if output.exists() and not output.is_dir():
            raise ValueError(f"{output} is a file; expected a folder for the masks of several scans. Name a folder.")
        return output / name
    return output if split_volume_name(output.name)[1] else output / name


def _slices(model_input: Any) -> np.ndarray:
    expected = (
        "expected an array (n, rows, columns) of the sagittal slices of one series, the path of a volume, or a list of "
        "such paths"
    )
    if not isinstance(model_input, (np.ndarray, list, tuple)):
        raise ValueError(
            f"the input is a {type(model_input).__name__}; {expected}. Convert it, or pass the file's path."
        )
    try:
        slices = np.asarray(model_input)
    except ValueError:
        raise ValueError(f"the input is a list of unequal rows; {expected}. Make all slices equally large.") from None
    if not (np.issubdtype(slices.dtype, np.integer) or np.issubdtype(slices.dtype, np.floating)):
        raise ValueError(
            f"the input holds values of type {slices.dtype}; {expected}; numbers must be real. Convert it."
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


set_model(LumbarSegmenter())
