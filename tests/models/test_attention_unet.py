from __future__ import annotations

import re

import numpy as np
import pytest

from lumbarflow import models
from lumbarflow.backend import load_keras

# The arithmetic stands in the docstring of lumbarflow.models.attention_unet.
PARAMETERS = {
    "encoder_1": 2_576,
    "encoder_2": 14_080,
    "encoder_3": 55_808,
    "encoder_4": 222_208,
    "encoder_5": 886_784,
    "gate_1": 24_705,
    "gate_2": 6_209,
    "gate_3": 1_569,
    "decoder_1": 131_200 + 443_392,
    "decoder_2": 32_832 + 111_104,
    "decoder_3": 8_224 + 27_904,
    "decoder_4": 2_064 + 7_040,
    "classes": 68,
}


@pytest.fixture(scope="module")
def net():
    return models.build("attention_unet", (32, 48), 1, 4)


def test_it_has_the_parameters_of_the_docstring(net):
    counts = dict.fromkeys(PARAMETERS, 0)
    for layer in net.layers:
        if layer.count_params():
            counts[re.match(r"(encoder|gate|decoder)_\d+|classes", layer.name).group()] += layer.count_params()
    assert counts == PARAMETERS
    assert net.count_params() == 1_977_767


def test_a_level_is_twice_convolution_norm_activation(net):
    level = [layer for layer in net.layers if re.match("encoder_3_[^p]", layer.name)]
    assert [type(layer).__name__ for layer in level] == ["Conv2D", "BatchNormalization", "ReLU"] * 2
    for before, after in zip(level, level[1:], strict=False):
        assert after.input is before.output


def test_every_skip_but_the_finest_is_gated_by_the_next_coarser_level(net):
    signals = ["encoder_5_activation_2", "decoder_1_activation_2", "decoder_2_activation_2"]
    for k, signal in enumerate(signals, start=1):
        skip = net.get_layer(f"encoder_{5 - k}_activation_2").output
        assert net.get_layer(f"decoder_{k}_skip").input[1] is net.get_layer(f"gate_{k}_gated").output
        assert net.get_layer(f"gate_{k}_gated").input[0] is skip
        assert net.get_layer(f"gate_{k}_pooling").input is skip
        assert net.get_layer(f"gate_{k}_signal").input is net.get_layer(signal).output
    assert net.get_layer("decoder_4_skip").input[1] is net.get_layer("encoder_1_activation_2").output


def test_a_gate_computes_the_papers_equation_on_the_coarser_grid():
    keras = load_keras()
    net = models.build("attention_unet", (8, 12), 1, 4, widths=[2, 4, 6])
    rng = np.random.default_rng(0)
    net.set_weights([rng.normal(size=weight.shape) for weight in net.get_weights()])
    for norm in (layer for layer in net.layers if "_norm_" in layer.name):
        norm.moving_variance.assign(np.ones(norm.moving_variance.shape))
    names = ["encoder_2_activation_2", "encoder_3_activation_2", "gate_1_attention", "gate_1_upsample", "gate_1_gated"]
    inside = keras.Model(net.input, [net.get_layer(name).output for name in names])
    slices = rng.normal(size=(2, 8, 12, 1))
    x, g, attention, upsampled, gated = (np.asarray(part, np.float64) for part in inside.predict(slices, verbose=0))
    w_x, w_g, b_g, psi, b_psi = (
        np.asarray(weight, np.float64)
        for name in ("skip", "signal", "attention")
        for weight in net.get_layer(f"gate_1_{name}").get_weights()
    )
    mean = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    q = np.maximum(mean @ w_x[0, 0] + g @ w_g[0, 0] + b_g, 0) @ psi[0, 0] + b_psi
    assert q.shape == (2, 2, 3, 1)
    np.testing.assert_allclose(attention, 1 / (1 + np.exp(-q)), rtol=1e-4)
    # Halfway between coarse pixels lie fine ones a quarter and three quarters on; at the edge the value holds on.
    rows = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    columns = np.array([[1, 0, 0], [0.75, 0.25, 0], [0.25, 0.75, 0], [0, 0.75, 0.25], [0, 0.25, 0.75], [0, 0, 1]])
    np.testing.assert_allclose(upsampled, np.einsum("ar,bc,nrck->nabk", rows, columns, attention), rtol=1e-5)
    np.testing.assert_allclose(gated, x * upsampled, rtol=1e-5)


def test_settings_reach_the_layers():
    settings = {"widths": [3, 1, 5], "batch_norm_momentum": 0.75, "kernel_initializer": "glorot_uniform"}
    net = models.build("attention_unet", (4, 8), 2, 4, precision="mixed_bfloat16", **settings)
    layers = {layer.name: layer for layer in net.layers}
    assert [layers[f"{level}_convolution_1"].filters for level in ("encoder_3", "decoder_1", "decoder_2")] == [5, 1, 3]
    assert {layer.momentum for name, layer in layers.items() if "_norm_" in name} == {0.75}
    # Half of one channel is still one.
    assert layers["gate_1_signal"].filters == 1
    assert type(layers["gate_1_skip"].kernel_initializer).__name__ == "GlorotUniform"
    parts = [layer for name, layer in layers.items() if name.startswith(("encoder", "gate", "decoder"))]
    assert {layer.compute_dtype for layer in parts} == {"bfloat16"}
    assert layers["encoder_1_convolution_1"].input.shape == (None, 4, 8, 2)


def test_all_convolutions_start_as_he_et_al(net):
    convolutions = [layer for layer in net.layers if type(layer).__name__.startswith("Conv")]
    assert {type(layer.kernel_initializer).__name__ for layer in convolutions} == {"HeNormal"}


def test_a_size_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match=r"attention_unet: size \[40, 32\] is not divisible by 16.*preprocess.size"):
        models.build("attention_unet", (40, 32), 1, 4)
