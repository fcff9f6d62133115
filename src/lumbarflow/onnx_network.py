"""A trained net as an ONNX graph, run by ONNX Runtime: what is evaluated, registered and served. No Keras in here.

It computes in float32 whatever the net was trained in, so that a scan gets the same labels on every processor, and
it is faster there than Keras (benchmarks/prediction.py). `lumbarflow.networks.to_onnx` makes the graph.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np

from lumbarflow.parallel import cores

# The key of a graph's own record that holds `training_record.weights_digest` of the net it was made from.
WEIGHTS = "weights"


class OnnxNetwork:
    """A net in the manner of a Keras model, as far as `lumbarflow.inference.Segmenter` needs one.

    Args:
        graph: the bytes that `networks.to_onnx` returned, or the path of a file with them.
    Attributes:
        path: of the file; None for bytes.
        input_shape: (None, H, W, channels), as Keras has it.
        weights: hex digest of the Keras model's weights that the graph was made from.
    Raises:
        ValueError: no such file, no ONNX graph, or one that is not ours.
    """

    def __init__(self, graph: bytes | str | Path):
        import onnxruntime

        # It would warn on standard error of hardware that it looked for and did not find.
        onnxruntime.set_default_logger_severity(3)
        onnxruntime.disable_telemetry_events()
        self.path = None if isinstance(graph, bytes) else Path(graph)
        self._graph = graph
        name = self.path or "the graph"
        if self.path and not self.path.is_file():
            raise ValueError(f"{name}: no such file; expected an ONNX graph. Register the net again.")
        # Of several, the first that is installed computes; TensorRT, which compiles for minutes, is left out. Unless
        # told not to, NVIDIA's GPUs round the factors of float32 to 10 bits (TF32), as bfloat16 does to 7.
        providers = [
            (provider, settings)
            for provider, settings in (("CUDAExecutionProvider", {"use_tf32": 0}), ("CPUExecutionProvider", {}))
            if provider in onnxruntime.get_available_providers()
        ]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # see `predict`
        try:
            self._session = onnxruntime.InferenceSession(
                graph if self.path is None else str(self.path), options, providers=providers
            )
        except Exception as error:  # ONNX Runtime's own types have nothing in common but this
            raise ValueError(
                f"{name}: not readable as an ONNX graph ({error}); expected one of `networks.to_onnx`."
            ) from error
        record = self._session.get_modelmeta().custom_metadata_map
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if WEIGHTS not in record or (len(inputs), len(outputs)) != (1, 1):
            raise ValueError(
                f"{name}: an ONNX graph with {len(inputs)} inputs, {len(outputs)} outputs and the record "
                f"{sorted(record)}; expected one of each and {WEIGHTS!r}, as `networks.to_onnx` makes it."
            )
        self.weights = record[WEIGHTS]
        self.input_shape = (None, *inputs[0].shape[1:])
        self._input = inputs[0].name

    def __reduce__(self) -> tuple:
        # The bytes: a worker on another machine may not see the file.
        return _opened, (self._graph if self.path is None else self.path.read_bytes(),)

    def predict(self, images: np.ndarray, batch_size: int | None = None, verbose: int = 0) -> np.ndarray:
        """float32 (n, H, W, channels) -> probabilities float32 (n, H, W, classes).

        A slice at a time on each core: of slices, cores lose less to each other than within one, and the result depends
        neither on their number nor on the batch's. `batch_size` and `verbose` are there because Keras models have them.
        """
        with ThreadPoolExecutor(cores()) as pool:
            return np.concatenate(list(pool.map(self._slice, images)))

    def _slice(self, image: np.ndarray) -> np.ndarray:
        return self._session.run(None, {self._input: image[None]})[0]


@lru_cache(maxsize=1)
def _opened(graph: bytes) -> OnnxNetwork:
    """The net in a worker, which gets it with every series and opens it with the first."""
    return OnnxNetwork(graph)
