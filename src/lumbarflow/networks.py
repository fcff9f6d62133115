"""Nets as files, and copies of nets; importing this imports Keras."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

from lumbarflow import models
from lumbarflow.backend import load_keras, quiet_stderr
from lumbarflow.files import write_atomically
from lumbarflow.onnx_network import WEIGHTS, OnnxNetwork
from lumbarflow.training_record import weights_digest

logger = logging.getLogger(__name__)
keras = load_keras()
models.register_layers()


def save_model(model: keras.Model, path: str | Path) -> None:
    """Write a net as a `.keras` file, without optimiser or loss, under a temporary name first.

    Raises ValueError if the path does not end in `.keras`.
    """
    if Path(path).suffix != ".keras":
        raise ValueError(f"{path}: expected a name ending in .keras, the format that loads without running code.")
    write_atomically(path, uncompiled(model).save if model.compiled else model.save)


def load_model(path: str | Path, precision: str | None = None) -> keras.Model:
    """Read a `.keras` file in Keras's safe mode, which runs no code from the file; uncompiled.

    Args:
        precision: None keeps the precision that the net was trained in; "float32" computes in that throughout, for
            processors that only emulate bfloat16; probabilities then differ by bfloat16's rounding.
    Raises:
        ValueError: there is no such file, it is no `.keras` file, or the precision is another one.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; expected a .keras file that save_model wrote.")
    if precision not in (None, "float32"):
        raise ValueError(f"precision is {precision!r}; expected None (as trained) or 'float32'.")
    model = keras.saving.load_model(path, compile=False, safe_mode=True)
    return uncompiled(model, dtype=precision) if precision else model


def uncompiled(model: keras.Model, dtype: str | None = None) -> keras.Model:
    """A copy on one device with the same weights, uncompiled; with `dtype`, all layers compute in that."""
    config = model.get_config()
    for layer in config["layers"]:
        if dtype:
            layer["config"]["dtype"] = dtype
        if "synchronized" in layer["config"]:
            # Of several devices' batch normalisation; where it is not TensorFlow's, it cannot even be read.
            layer["config"]["synchronized"] = False
    twin = type(model).from_config(config)
    twin.set_weights(model.get_weights())
    return twin


def to_onnx(model: keras.Model) -> bytes:
    """The net as an ONNX graph in float32, for `OnnxNetwork`; it records the digest of the net's weights.

    Probabilities differ from those of Keras in float32 by rounding. The last graph is kept: what one command evaluates
    and registers is converted once.

    Raises:
        ValueError: the net has an operation that ONNX or ONNX Runtime lacks.
    """
    net = (model.to_json(), weights_digest(model))
    # Threads that segment with several nets take turns: standard error is caught meanwhile, and there is one of it.
    with _converting:
        if net not in _converted:
            graph = (_convert if keras.backend.backend() == "tensorflow" else _converted_on_tensorflow)(model)
            _converted.clear()
            _converted[net] = graph
        return _converted[net]


# (architecture, digest of the weights) -> graph, of the last net alone.
_converted: dict[tuple[str, str], bytes] = {}
_converting = threading.Lock()


def _convert(model: keras.Model) -> bytes:
    import onnx

    # The converter tells of every step, and goes on without what it cannot convert: the checker finds that.
    logging.getLogger("tf2onnx").setLevel(logging.CRITICAL)
    signature = [keras.InputSpec(shape=model.input_shape, dtype="float32", name="slices")]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), quiet_stderr("the conversion to ONNX"):
        warnings.simplefilter("ignore")  # of what other libraries have deprecated
        path = Path(folder, "network.onnx")
        uncompiled(model, dtype="float32").export(path, format="onnx", verbose=False, input_signature=signature)
        graph = onnx.load(path)
    try:
        onnx.checker.check_model(graph)
    except onnx.checker.ValidationError as error:
        raise ValueError(f"{model.name}: it cannot be converted to ONNX: {str(error).splitlines()[0]}") from error
    onnx.helper.set_model_props(graph, {WEIGHTS: weights_digest(model)})
    content = graph.SerializeToString(deterministic=True)
    OnnxNetwork(content)  # not all that the checker accepts does ONNX Runtime compute
    return content


# The file of a net, and that of its graph.
_CONVERT = """
import sys
from pathlib import Path
from lumbarflow.networks import load_model, to_onnx
Path(sys.argv[2]).write_bytes(to_onnx(load_model(sys.argv[1])))
"""


def _converted_on_tensorflow(model: keras.Model) -> bytes:
    """`to_onnx` in a process of its own, on TensorFlow and without its GPUs: the converter reads nothing else."""
    environment = {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with tempfile.TemporaryDirectory() as folder:
        net, graph = Path(folder, "network.keras"), Path(folder, "network.onnx")
        save_model(model, net)
        command = [sys.executable, "-c", _CONVERT, str(net), str(graph)]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise ValueError(f"{model.name}: its conversion to ONNX on TensorFlow failed: {why}")
        return graph.read_bytes()


def for_inference(model: keras.Model) -> keras.Model | OnnxNetwork:
    """The net as it is evaluated and served: by ONNX Runtime, or as it is where it has operations that ONNX lacks."""
    try:
        graph = to_onnx(model)
    except ValueError as error:
        logger.info("%s. Keras computes it.", error)
        return model
    return OnnxNetwork(graph)
