from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumbarflow.backend import load_keras
from lumbarflow.losses import FocalDiceLoss, MeanIoU

keras = load_keras()

# One slice of one row and two columns: classes 1 and 3, predicted with 0.5 and 0.2.
TARGETS = np.array([[[1, 3]]], np.uint8)
PREDICTED = np.array([[[[0.25, 0.5, 0.25, 0.0], [0.3, 0.1, 0.4, 0.2]]]], np.float32)


def value(loss, targets, predicted) -> float:
    return float(loss(targets, predicted))


def random_batch(seed: int, shape=(2, 3, 5)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    predicted = rng.dirichlet(np.full(4, 0.5), size=shape).astype(np.float32)
    return rng.integers(0, 4, shape).astype(np.uint8), predicted


def one_hot(targets) -> np.ndarray:
    return np.eye(4, dtype=np.float32)[targets]


def test_focal_part_by_hand():
    expected = (0.5**4 * -math.log(0.5) + 0.8**4 * -math.log(0.2)) / 2
    assert value(FocalDiceLoss(alpha=1), TARGETS, PREDICTED) == pytest.approx(expected, rel=1e-5)


def test_pooled_dice_part_by_hand():
    # Shared 0.5 + 0.2; targets and probabilities sum to 1 in each of the two pixels.
    expected = 1 - (2 * 0.7 + 1) / (2 + 2 + 1)
    assert value(FocalDiceLoss(alpha=0), TARGETS, PREDICTED) == pytest.approx(expected, rel=1e-5)


def test_class_dice_part_by_hand():
    # Classes 0 and 2 are predicted though absent, with 0.55 and 0.65 in all.
    by_class = [
        (0 + 2) / (0 + 0.55 + 2),
        (2 * 0.5 + 2) / (1 + 0.6 + 2),
        (0 + 2) / (0 + 0.65 + 2),
        (2 * 0.2 + 2) / (1 + 0.2 + 2),
    ]
    loss = FocalDiceLoss(alpha=0, smooth=2, dice_over="classes")
    assert value(loss, TARGETS, PREDICTED) == pytest.approx(1 - sum(by_class) / 4, rel=1e-5)


def test_parts_are_weighted_by_alpha():
    focal, dice = (value(FocalDiceLoss(alpha=alpha), TARGETS, PREDICTED) for alpha in (1, 0))
    assert value(FocalDiceLoss(), TARGETS, PREDICTED) == pytest.approx(0.6 * focal + 0.4 * dice, rel=1e-5)


def test_defaults_are_those_of_the_papers_text():
    config = FocalDiceLoss().get_config()
    assert (config["gamma"], config["alpha"], config["smooth"], config["dice_over"]) == (4, 0.6, 1, "pooled")


@given(seed=st.integers(0, 2**32 - 1), dice_over=st.sampled_from(["pooled", "classes"]))
@settings(max_examples=20, deadline=None)
def test_dice_part_lies_between_0_and_1_and_the_loss_is_finite(seed, dice_over):
    targets, predicted = random_batch(seed)
    assert 0 <= value(FocalDiceLoss(alpha=0, dice_over=dice_over), targets, predicted) <= 1
    assert 0 <= value(FocalDiceLoss(dice_over=dice_over), targets, predicted) < math.inf


@given(seed=st.integers(0, 2**32 - 1), dice_over=st.sampled_from(["pooled", "classes"]))
@settings(max_examples=20, deadline=None)
def test_a_perfect_prediction_costs_nothing(seed, dice_over):
    targets, _ = random_batch(seed)
    assert value(FocalDiceLoss(dice_over=dice_over), targets, one_hot(targets)) == pytest.approx(0, abs=1e-6)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_gamma_0_is_the_cross_entropy(seed):
    targets, predicted = random_batch(seed)
    expected = float(np.mean(keras.losses.sparse_categorical_crossentropy(targets, predicted)))
    assert value(FocalDiceLoss(gamma=0, alpha=1), targets, predicted) == pytest.approx(expected, rel=1e-4)


@given(seed=st.integers(0, 2**32 - 1), dice_over=st.sampled_from(["pooled", "classes"]))
@settings(max_examples=20, deadline=None)
def test_the_order_of_pixels_and_of_classes_does_not_matter(seed, dice_over):
    targets, predicted = random_batch(seed)
    rng = np.random.default_rng(seed)
    classes, pixels = rng.permutation(4), rng.permutation(targets.size)
    # Class c becomes classes[c].
    renamed_targets = classes[targets].ravel()[pixels].reshape(targets.shape)
    renamed = predicted[..., np.argsort(classes)].reshape(-1, 4)[pixels].reshape(predicted.shape)
    loss = FocalDiceLoss(dice_over=dice_over)
    assert value(loss, renamed_targets, renamed) == pytest.approx(value(loss, targets, predicted), rel=1e-4)


@pytest.mark.parametrize("gamma", [0, 0.4, 4])
@pytest.mark.parametrize("dice_over", ["pooled", "classes"])
def test_certainty_right_or_wrong_leaves_loss_and_gradient_finite(gamma, dice_over):
    # The gradient as training takes it: a net that outputs 0 and 1 exactly, one pixel right, one wrong.
    targets = np.array([[[1, 3]]], np.uint8)
    loss = FocalDiceLoss(gamma=gamma, dice_over=dice_over)
    inputs = keras.Input((1, 2, 4))
    model = keras.Model(inputs, keras.layers.EinsumDense("nijc,cd->nijd", (1, 2, 4), kernel_initializer="ones")(inputs))
    model.layers[-1].set_weights([np.eye(4)])
    model.compile(keras.optimizers.SGD(0.1), loss=loss)
    assert math.isfinite(model.train_on_batch(one_hot(np.array([[[1, 0]]])), targets))
    assert np.isfinite(model.get_weights()[0]).all()


def test_half_precision_predictions_are_reduced_in_float32():
    # 2**17 pixels of probability 1/2 cannot be summed in bfloat16, which stops counting at 256.
    targets = np.zeros((1, 256, 512), np.uint8)
    predicted = keras.ops.full((1, 256, 512, 2), 0.5, dtype="bfloat16")
    assert value(FocalDiceLoss(alpha=0), targets, predicted) == pytest.approx(0.5, abs=1e-4)


def test_the_loss_survives_serialisation():
    loss = FocalDiceLoss(gamma=2, alpha=0.3, smooth=5, dice_over="classes")
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert isinstance(again, FocalDiceLoss)
    assert again.get_config() == loss.get_config()
    assert value(again, TARGETS, PREDICTED) == value(loss, TARGETS, PREDICTED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": -1}, "loss.gamma is -1; expected 0 or more"),
        ({"alpha": 1.5}, "loss.alpha is 1.5; expected a weight"),
        ({"smooth": 0}, "loss.smooth is 0; expected more than 0"),
        ({"dice_over": "slices"}, "loss.dice_over is 'slices'; expected one of"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FocalDiceLoss(**arguments)


def test_mean_iou_pools_batches_of_unequal_size():
    metric = MeanIoU(4)
    metric.update_state(np.array([[[0, 0, 1]]], np.uint8), one_hot([[[0, 1, 1]]]))
    metric.update_state(np.array([[[0], [2]]], np.uint8), one_hot([[[0], [0]]]))
    # Pooled: class 0 has 2 right of 4 (one lost to 1, one taken from 2), 1 has 1 of 2, 2 has 0 of 1; 3 never occurs.
    assert float(metric.result()) == pytest.approx((2 / 4 + 1 / 2 + 0) / 3)
    metric.reset_state()
    metric.update_state(np.array([[[3]]], np.uint8), one_hot([[[3]]]))
    assert float(metric.result()) == pytest.approx(1)


def test_mean_iou_decides_by_the_highest_probability_also_in_bfloat16():
    metric = MeanIoU(4)
    metric.update_state(TARGETS, keras.ops.cast(PREDICTED, "bfloat16"))
    # Predicted 1 and 2 for 1 and 3.
    assert float(metric.result()) == pytest.approx((1 + 0 + 0) / 3)


def test_mean_iou_counts_more_pixels_than_bfloat16_could():
    metric = MeanIoU(4)
    targets = np.zeros((1, 100, 100), np.uint8)
    predicted = one_hot(targets)
    predicted[0, 0, :10] = one_hot([1] * 10)
    metric.update_state(targets, keras.ops.cast(predicted, "bfloat16"))
    assert float(metric.result()) == pytest.approx((9_990 / 10_000 + 0) / 2, rel=1e-6)


def test_the_metric_survives_serialisation():
    again = keras.metrics.deserialize(keras.metrics.serialize(MeanIoU(4)))
    assert isinstance(again, MeanIoU)
    assert (again.num_classes, again.name) == (4, "mean_iou")
