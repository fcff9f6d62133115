from __future__ import annotations

import logging

import numpy as np
import pytest

from lumbarflow import models, networks
from lumbarflow.backend import load_keras
from lumbarflow.onnx_network import OnnxNetwork
from lumbarflow.training_record import weights_digest

keras = load_keras()
SIZE = (16, 32)
SMALL = {
    "encoder_widths": [4, 4, 8],
    "encoder_dropouts": [0.1] * 3,
    "decoder_widths": [4],
    "decoder_dropouts": [0.1],
}


@pytest.fixture(autouse=True)
def nothing_converted(monkeypatch):
    monkeypatch.setattr(networks, "_converted", {})


def scrambled(name, channels=1, **settings):
    """A net none of whose weights, moving averages included, is what a new one has."""
    net = models.build(name, SIZE, channels, 4, **settings)
    rng = np.random.default_rng(0)
    for weight in net.weights:
        value = weight.numpy() + rng.normal(0, 0.1, weight.shape)
        weight.assign(np.abs(value) if "variance" in weight.path else value)
    return net


def images(channels=1):
    return np.random.default_rng(1).random((3, *SIZE, channels)).astype(np.float32)


@pytest.mark.parametrize(
    "name, channels, settings",
    [
        ("modified_unet", 1, SMALL),
        ("modified_unet", 3, SMALL | {"upsample_block": "all", "normalisation": "group", "groups": 2}),
        ("attention_unet", 1, {"widths": [4, 6, 8]}),
        ("plain_unet", 1, {"widths": [4, 6, 8], "dropouts": [0.1, 0.1, 0.1]}),
    ],
)
def test_every_net_computes_the_same_as_a_graph(name, channels, settings):
    net = scrambled(name, channels, **settings)
    network = networks.for_inference(net)
    assert isinstance(network, OnnxNetwork)
    assert network.weights == weights_digest(net)
    assert network.input_shape == net.input_shape
    expected = net.predict(images(channels), verbose=0)
    assert 0.01 < expected.std() < 0.4
    # By rounding, and group normalisation's most: its sums are made in another order with another number of threads.
    np.testing.assert_allclose(network.predict(images(channels), 2), expected, atol=1e-4)


def test_a_net_of_bfloat16_becomes_a_graph_of_float32():
    half = scrambled("modified_unet", precision="mixed_bfloat16", **SMALL)
    whole = networks.uncompiled(half, dtype="float32")
    found = networks.for_inference(half).predict(images(), 3)
    np.testing.assert_allclose(found, whole.predict(images(), verbose=0), atol=1e-5)
    assert np.abs(found - half.predict(images(), verbose=0)).max() > 1e-4


def test_the_same_net_computes_the_same_bits_whenever_it_is_converted():
    net = scrambled("modified_unet", **SMALL)
    one = networks.for_inference(net).predict(images(), 3)
    networks._converted.clear()
    np.testing.assert_array_equal(networks.for_inference(net).predict(images(), 3), one)


def test_what_one_command_evaluates_and_registers_is_converted_once(monkeypatch, tmp_path):
    conversions = []
    convert = networks._convert
    monkeypatch.setattr(networks, "_convert", lambda net: conversions.append(net) or convert(net))
    net = scrambled("modified_unet", **SMALL)
    graph = networks.to_onnx(net)
    networks.save_model(net, tmp_path / "net.keras")
    assert networks.to_onnx(networks.load_model(tmp_path / "net.keras")) is graph
    assert len(conversions) == 1

    # Another net of the same shape, and the same weights in a net that computes something else with them.
    retrained = networks.uncompiled(net)
    retrained.set_weights([0.9 * weight for weight in net.get_weights()])
    leakier = models.build("modified_unet", SIZE, 1, 4, leaky_relu_slope=0.3, **SMALL)
    leakier.set_weights(net.get_weights())
    for other in (retrained, leakier, net):
        expected = other.predict(images(), verbose=0)
        np.testing.assert_allclose(networks.for_inference(other).predict(images()), expected, atol=1e-5)
    assert conversions[1:] == [retrained, leakier, net]


def test_a_net_that_onnx_cannot_express_stays_with_keras(caplog, capfd):
    atlas = models.build("atlas", SIZE, 1, 4)
    with pytest.raises(ValueError, match="atlas: it cannot be converted to ONNX"):
        networks.to_onnx(atlas)
    with caplog.at_level(logging.INFO, "lumbarflow"):
        assert networks.for_inference(atlas) is atlas
    assert "Keras computes it" in caplog.text
    assert capfd.readouterr().err == ""


def test_a_graph_that_onnx_runtime_refuses_is_none(monkeypatch):
    def refuses(graph):
        raise ValueError("the graph: not readable")

    net = scrambled("modified_unet", **SMALL)
    monkeypatch.setattr(networks, "OnnxNetwork", refuses)
    # What is registered follows `to_onnx`, what is evaluated `for_inference`: both have to say the same.
    with pytest.raises(ValueError, match="not readable"):
        networks.to_onnx(net)
    assert networks.for_inference(net) is net


@pytest.mark.integration
def test_a_net_of_another_backend_is_converted_on_tensorflow(monkeypatch):
    net = scrambled("modified_unet", **SMALL)
    expected = networks.for_inference(net)
    # (The process that converts is another one, which this leaves alone.)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    found = networks.for_inference(net)
    assert found.weights == expected.weights
    np.testing.assert_array_equal(found.predict(images()), expected.predict(images()))


def test_without_tensorflow_another_backends_net_stays_as_it_is(monkeypatch, caplog):
    net = scrambled("modified_unet", **SMALL)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    # Stands in for the process that converts: Python, without this project's libraries.
    monkeypatch.setattr(networks, "_CONVERT", "import tensorflow_that_is_not_there")
    with caplog.at_level(logging.INFO, "lumbarflow"):
        assert networks.for_inference(net) is net
    assert "modified_unet: its conversion to ONNX on TensorFlow failed: ModuleNotFoundError: No module" in caplog.text
