from __future__ import annotations

import re

import numpy as np
import pytest

from lumbarflow import models
from lumbarflow.backend import set_seed

# The arithmetic stands in the docstring of lumbarflow.models.unet.
PARAMETERS_AS_CODED = {
    "encoder_1": 2_544,
    "encoder_2": 14_016,
    "encoder_3": 55_680,
    "encoder_4": 221_952,
    "encoder_5": 886_272,
    "encoder_6": 3_542_016,
    "decoder_1": 1_180_928 + 1_476_096,
    "decoder_2": 131_200 + 369_408,
    "decoder_3": 32_832 + 92_544,
    "decoder_4": 8_224 + 23_232,
    "classes": 132,
}
TINY = {
    "encoder_widths": [3, 4, 5],
    "encoder_dropouts": [0.1, 0.2, 0.3],
    "decoder_widths": [4],
    "decoder_dropouts": [0.1],
}


# Two decoder levels, so that one is coarser, and widths that share no divisor above 2.
TWO_LEVELS = {
    "encoder_widths": [2, 4, 6, 8],
    "encoder_dropouts": [0.1, 0.1, 0.1, 0.1],
    "decoder_widths": [6, 4],
    "decoder_dropouts": [0.1, 0.1],
}


def parameters_by_level(model) -> dict[str, int]:
    counts: dict[str, int] = {}
    for layer in model.layers:
        level = re.match(r"(encoder|decoder)_\d+|classes", layer.name)
        if layer.count_params():
            counts[level.group()] = counts.get(level.group(), 0) + layer.count_params()
    return counts


@pytest.fixture(scope="module")
def as_coded():
    return models.build("modified_unet", (32, 48), 1, 4)


def test_the_net_as_coded_has_the_papers_parameters(as_coded):
    assert parameters_by_level(as_coded) == PARAMETERS_AS_CODED
    assert as_coded.count_params() == 8_037_076


def test_upsample_blocks_at_all_levels_add_their_parameters():
    # At 128, 64 and 32 channels: 3x3 instead of 2x2 kernels, and a batch normalisation.
    added = sum(5 * 2 * width * width + 4 * width for width in (128, 64, 32))
    assert models.build("modified_unet", (16, 16), 1, 4, upsample_block="all").count_params() == 8_037_076 + added


def test_levels_stand_at_the_papers_resolutions(as_coded):
    strides = {f"encoder_{k}": stride for k, stride in enumerate([1, 2, 4, 8, 16, 16], start=1)}
    strides |= {f"decoder_{k}": stride for k, stride in enumerate([8, 4, 2, 1], start=1)}
    for level, stride in strides.items():
        assert as_coded.get_layer(f"{level}_convolution_2").output.shape[1:3] == (32 // stride, 48 // stride)
    assert as_coded.output.shape == (None, 32, 48, 4)


def test_a_level_is_convolution_norm_dropout_convolution(as_coded):
    first, norm, dropout, second = (layer for layer in as_coded.layers if re.match("encoder_3_[^p]", layer.name))
    assert [type(layer).__name__ for layer in (first, norm, dropout, second)] == [
        "Conv2D",
        "BatchNormalization",
        "Dropout",
        "Conv2D",
    ]
    for convolution in (first, second):
        assert convolution.get_config()["activation"] == "relu"
        assert convolution.kernel_initializer.__class__.__name__ == "GlorotUniform"
    assert [norm.input, dropout.input, second.input] == [first.output, norm.output, dropout.output]


def test_dropouts_and_slope_are_the_papers(as_coded):
    rates = [layer.rate for layer in as_coded.layers if type(layer).__name__ == "Dropout"]
    assert rates == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.2, 0.2, 0.1, 0.1]
    slopes = [layer.negative_slope for layer in as_coded.layers if type(layer).__name__ == "LeakyReLU"]
    assert np.allclose(slopes, [0.1])


def test_skips_join_the_encoder_level_of_equal_stride(as_coded):
    for decoder, encoder in zip((1, 2, 3, 4), (4, 3, 2, 1), strict=True):
        joined = as_coded.get_layer(f"decoder_{decoder}_skip").input
        assert any(tensor is as_coded.get_layer(f"encoder_{encoder}_convolution_2").output for tensor in joined)


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_probabilities_are_float32_and_sum_to_one(precision):
    model = models.build("modified_unet", (4, 6), 2, 4, precision=precision, **TINY)
    probabilities = model.predict(np.random.default_rng(0).normal(size=(3, 4, 6, 2)), verbose=0)
    assert probabilities.dtype == np.float32
    assert probabilities.shape == (3, 4, 6, 4)
    # bfloat16 would leave sums off by up to 1/256.
    assert np.allclose(probabilities.sum(axis=-1), 1, atol=1e-6)


def test_settings_reach_the_layers():
    model = models.build(
        "modified_unet",
        (4, 6),
        1,
        4,
        **TINY,
        leaky_relu_slope=0.25,
        batch_norm_momentum=0.9,
        kernel_initializer="he_normal",
        precision="mixed_bfloat16",
    )
    layers = {layer.name: layer for layer in model.layers}
    assert layers["decoder_1_upsample_activation"].negative_slope == 0.25
    assert {norm.momentum for name, norm in layers.items() if name.endswith("_norm")} == {0.9}
    assert layers["decoder_1_upsample"].kernel_initializer.__class__.__name__ == "HeNormal"
    assert {layer.compute_dtype for name, layer in layers.items() if name.startswith(("encoder", "decoder"))} == {
        "bfloat16"
    }


@pytest.mark.parametrize(("normalisation", "groups_of_a_level"), [("group", 2), ("instance", 6)])
def test_other_normalisations_stand_where_the_batchs_stood(normalisation, groups_of_a_level):
    # Their layers lack the two moving averages of each channel: 2 + 4 + 6 + 8 in the encoder, 6 + 4 + 6 in the decoder.
    plain = models.build("modified_unet", (8, 12), 1, 4, **TWO_LEVELS)
    other = models.build("modified_unet", (8, 12), 1, 4, normalisation=normalisation, groups=2, **TWO_LEVELS)
    assert [layer.name for layer in other.layers] == [layer.name for layer in plain.layers]
    assert other.count_params() == plain.count_params() - 2 * (20 + 16)
    assert other.get_layer("encoder_3_norm").groups == groups_of_a_level
    assert other.get_layer("decoder_1_upsample_norm").groups == groups_of_a_level


@pytest.mark.parametrize(("normalisation", "alone"), [("batch", False), ("group", True), ("instance", True)])
def test_group_and_instance_normalisation_treat_a_slice_alone(normalisation, alone):
    model = models.build("modified_unet", (8, 12), 1, 4, normalisation=normalisation, groups=2, **TWO_LEVELS)
    for layer in model.layers:
        if "dropout" in layer.name:
            layer.rate = 0
    slices = np.random.default_rng(0).normal(size=(3, 8, 12, 1)).astype(np.float32)
    # As in training, where the batch's own figures count.
    together, first = (np.asarray(model(batch, training=True))[0] for batch in (slices, slices[:1]))
    assert np.allclose(together, first, atol=1e-5) == alone


def test_a_width_that_the_groups_do_not_divide_is_refused():
    refused = {"normalisation": "group", "groups": 3, **TWO_LEVELS}
    with pytest.raises(ValueError, match=r"groups is 3, .* the width 2 of encoder_widths \[2, 4, 6, 8\]"):
        models.build("modified_unet", (8, 12), 1, 4, **refused)
    with pytest.raises(ValueError, match=r"groups is 3, .* the width 4 of decoder_widths \[6, 4\]"):
        models.build("modified_unet", (8, 12), 1, 4, **{**refused, "encoder_widths": [3, 6, 6, 9]})
    with pytest.raises(ValueError, match="groups is 0, "):
        models.build("modified_unet", (8, 12), 1, 4, **{**refused, "groups": 0})
    # The others make no groups.
    models.build("modified_unet", (8, 12), 1, 4, **{**refused, "normalisation": "instance"})


@pytest.mark.parametrize(("count", "added"), [(1, [260]), (3, [260, 516, 1028])])
def test_deep_supervision_adds_heads_at_coarser_decoder_levels(count, added):
    model = models.build("modified_unet", (32, 48), 1, 4, deep_supervision=count)
    suffixes = ["", "_2", "_4", "_8"][: count + 1]
    assert model.output_names == [f"probabilities{suffix}" for suffix in suffixes]
    assert [output.shape for output in model.outputs] == [
        (None, 32 // stride, 48 // stride, 4) for stride in (1, 2, 4, 8)[: count + 1]
    ]
    assert [model.get_layer(f"classes{suffix}").count_params() for suffix in suffixes] == [132, *added]
    assert model.count_params() == 8_037_076 + sum(added)
    assert model.get_layer("classes_2").input is model.get_layer("decoder_3_convolution_2").output


def test_deep_supervision_leaves_the_nets_own_initial_weights():
    def weights(count):
        set_seed(4)
        return models.build("modified_unet", (8, 12), 1, 4, deep_supervision=count, **TWO_LEVELS).get_weights()

    plain, supervised = weights(0), weights(1)
    assert len(supervised) == len(plain) + 2
    assert all(np.array_equal(a, b) for a, b in zip(plain, supervised, strict=False))


def test_probabilities_of_every_head_are_float32_and_sum_to_one():
    model = models.build("modified_unet", (8, 12), 1, 4, precision="mixed_bfloat16", deep_supervision=1, **TWO_LEVELS)
    for probabilities in model.predict(np.random.default_rng(0).normal(size=(3, 8, 12, 1)), verbose=0):
        assert probabilities.dtype == np.float32
        assert np.allclose(probabilities.sum(axis=-1), 1, atol=1e-6)


def test_a_size_that_the_strides_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"size \[32, 40\] is not divisible by 16.*preprocess.size"):
        models.build("modified_unet", (32, 40), 1, 4)
    with pytest.raises(ValueError, match=r"size \[0, 16\] is not divisible by 16"):
        models.build("modified_unet", (0, 16), 1, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_dropouts": [0.1]}, "encoder_widths has 3 levels and encoder_dropouts 1"),
        ({"decoder_dropouts": []}, "decoder_widths has 1 levels and decoder_dropouts 0"),
        ({"decoder_widths": [4, 4], "decoder_dropouts": [0, 0]}, "3 encoder levels and 2 decoder levels"),
        ({"upsample_block": "last"}, "upsample_block is 'last'"),
        ({"normalisation": "layer"}, "normalisation is 'layer'; expected one of"),
        ({"deep_supervision": 1}, "deep_supervision is 1; expected 0 to 0"),
        ({"deep_supervision": 2, **TWO_LEVELS}, "deep_supervision is 2; expected 0 to 1, .* 2 decoder levels"),
        ({"deep_supervision": -1}, "deep_supervision is -1; expected 0"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        models.build("modified_unet", (4, 4), 1, 4, **{**TINY, **changes})
