from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from lumbarflow import networks
from lumbarflow.backend import load_keras
from lumbarflow.onnx_network import OnnxNetwork
from lumbarflow.training_record import weights_digest

keras = load_keras()


@pytest.fixture(scope="module")
def model():
    """Two channels to the softmax of their sum and difference, by hand."""
    image = keras.Input((4, 6, 2))
    decide = keras.layers.Conv2D(2, 1, use_bias=False)
    net = keras.Model(image, keras.layers.Softmax()(decide(image)))
    decide.set_weights([np.float32([[1, 1], [1, -1]]).reshape(1, 1, 2, 2)])
    return net


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "network.onnx"
    path.write_bytes(networks.to_onnx(model))
    return path


def test_a_graph_computes_what_the_net_says(file):
    network = OnnxNetwork(file)
    assert network.input_shape == (None, 4, 6, 2)
    images = np.zeros((1, 4, 6, 2), np.float32)
    images[0, 3, 5] = 0.75, 0.25
    probabilities = network.predict(images, batch_size=1)
    assert (probabilities.dtype, probabilities.shape) == (np.float32, (1, 4, 6, 2))
    # softmax(1, 0.5) and, where the image is 0, of (0, 0)
    np.testing.assert_allclose(probabilities[0, 3, 5], [0.6224593, 0.3775407], atol=1e-6)
    np.testing.assert_array_equal(probabilities[0, :3], 0.5)


def test_slices_keep_their_order_whatever_the_batch(file, model):
    network = OnnxNetwork(file)
    images = np.random.default_rng(0).normal(size=(5, 4, 6, 2)).astype(np.float32)
    whole = network.predict(images, batch_size=5)
    for size in (1, 2, 7):
        np.testing.assert_array_equal(network.predict(images, batch_size=size), whole)
    np.testing.assert_allclose(whole, model.predict(images, verbose=0), atol=1e-6)


def test_a_graph_knows_the_weights_it_was_made_from(file, model):
    assert OnnxNetwork(file).weights == weights_digest(model)
    assert OnnxNetwork(file.read_bytes()).weights == weights_digest(model)


def test_running_a_graph_imports_no_keras(file):
    code = f"""
import sys, numpy as np
from lumbarflow.inference import Segmenter
from lumbarflow.onnx_network import OnnxNetwork
settings = {{"size": [4, 6], "keep_aspect": True, "normalisation": "z_score", "percentiles": [0, 100], "batch_size": 2}}
network = OnnxNetwork({str(file)!r})
network.predict(np.zeros((3, 4, 6, 2), np.float32), 2)
assert not {{"keras", "tensorflow", "jax", "kedro", "onnx"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_gpu_computes_in_float32_too(file, monkeypatch):
    import onnxruntime

    asked = []
    there = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    session = onnxruntime.InferenceSession

    def without_gpu(graph, options, providers):
        asked.extend(providers)
        return session(graph, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", without_gpu)
    OnnxNetwork(file)
    assert asked == [("CUDAExecutionProvider", {"use_tf32": 0}), ("CPUExecutionProvider", {})]


def test_what_is_no_graph_of_ours_is_refused(file, tmp_path):
    import onnx

    with pytest.raises(ValueError, match="none.onnx: no such file; expected an ONNX graph. Register"):
        OnnxNetwork(tmp_path / "none.onnx")
    (tmp_path / "torn.onnx").write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"torn.onnx: not readable as an ONNX graph \(.*\); expected one of"):
        OnnxNetwork(tmp_path / "torn.onnx")
    graph = onnx.load(file)
    del graph.metadata_props[:]
    with pytest.raises(
        ValueError, match=r"the graph: .* 1 inputs, 1 outputs and the record \[\]; expected one of each"
    ):
        OnnxNetwork(graph.SerializeToString())
