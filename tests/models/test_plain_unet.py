from __future__ import annotations

import re

import numpy as np
import pytest

from lumbarflow import models

# The arithmetic stands in the docstring of lumbarflow.models.plain_unet.
PARAMETERS = {
    "encoder_1": 2_480,
    "encoder_2": 13_888,
    "encoder_3": 55_424,
    "encoder_4": 221_440,
    "encoder_5": 885_248,
    "decoder_1": 131_200 + 442_624,
    "decoder_2": 32_832 + 110_720,
    "decoder_3": 8_224 + 27_712,
    "decoder_4": 2_064 + 6_944,
    "classes": 68,
}


@pytest.fixture(scope="module")
def net():
    return models.build("plain_unet", (32, 48), 1, 4)


def test_it_has_the_authors_parameters(net):
    counts = dict.fromkeys(PARAMETERS, 0)
    for layer in net.layers:
        if layer.count_params():
            counts[re.match(r"(encoder|decoder)_\d+|classes", layer.name).group()] += layer.count_params()
    assert counts == PARAMETERS
    assert net.count_params() == 1_940_868


def test_a_level_is_convolution_dropout_convolution(net):
    first, dropout, second = (layer for layer in net.layers if re.match("encoder_3_[^p]", layer.name))
    assert [type(layer).__name__ for layer in (first, dropout, second)] == ["Conv2D", "Dropout", "Conv2D"]
    assert [dropout.input, second.input] == [first.output, dropout.output]
    assert {layer.get_config()["activation"] for layer in (first, second)} == {"relu"}


def test_nothing_is_normalised_and_all_convolutions_start_as_he_et_al(net):
    kinds = [type(layer).__name__ for layer in net.layers]
    assert "BatchNormalization" not in kinds
    convolutions = [layer for layer in net.layers if type(layer).__name__.startswith("Conv")]
    assert len(convolutions) == 5 * 2 + 4 * 3 + 1
    assert {type(layer.kernel_initializer).__name__ for layer in convolutions} == {"HeNormal"}


def test_dropouts_are_the_authors(net):
    rates = [layer.rate for layer in net.layers if type(layer).__name__ == "Dropout"]
    assert rates == [0.1, 0.1, 0.2, 0.2, 0.3, 0.2, 0.2, 0.1, 0.1]


def test_levels_stand_at_halved_resolutions_and_skips_join_equal_ones(net):
    strides = {f"encoder_{k}": 2 ** (k - 1) for k in range(1, 6)} | {f"decoder_{k}": 2 ** (4 - k) for k in range(1, 5)}
    for level, stride in strides.items():
        assert net.get_layer(f"{level}_convolution_2").output.shape[1:3] == (32 // stride, 48 // stride)
    for k in range(1, 5):
        upsampled, skip = net.get_layer(f"decoder_{k}_skip").input
        assert upsampled is net.get_layer(f"decoder_{k}_upsample").output
        assert skip is net.get_layer(f"encoder_{5 - k}_convolution_2").output


def test_settings_reach_the_layers():
    settings = {"widths": [3, 5], "dropouts": [0.25, 0.5], "kernel_initializer": "glorot_uniform"}
    net = models.build("plain_unet", (4, 6), 2, 4, precision="mixed_bfloat16", **settings)
    layers = {layer.name: layer for layer in net.layers}
    assert [layers[f"{level}_convolution_1"].filters for level in ("encoder_1", "encoder_2", "decoder_1")] == [3, 5, 3]
    assert [layers[f"{level}_dropout"].rate for level in ("encoder_1", "encoder_2", "decoder_1")] == [0.25, 0.5, 0.25]
    assert type(layers["decoder_1_upsample"].kernel_initializer).__name__ == "GlorotUniform"
    assert {layer.compute_dtype for name, layer in layers.items() if name.startswith(("encoder", "decoder"))} == {
        "bfloat16"
    }
    assert net.predict(np.zeros((1, 4, 6, 2)), verbose=0).shape == (1, 4, 6, 4)


def test_a_size_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match=r"plain_unet: size \[32, 40\] is not divisible by 16.*preprocess.size"):
        models.build("plain_unet", (32, 40), 1, 4)


def test_a_level_without_dropout_is_refused():
    with pytest.raises(ValueError, match="plain_unet: widths has 2 levels and dropouts 1; expected one dropout"):
        models.build("plain_unet", (4, 4), 1, 4, widths=[3, 4], dropouts=[0.1])
