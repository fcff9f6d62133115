from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys

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


# All parts of the loss at once.
EVERYTHING = {"gamma": 3, "dice_over": "classes", "missed_weight": 0.7, "boundary_weight": 0.5, "boundary_width": 1}


def value(loss, targets, predicted) -> float:
    return float(loss(targets, predicted))


def run_python(code: str, *arguments, **environment: str):
    """What `code` prints, as JSON, in a process of its own."""
    finished = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


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


@pytest.mark.parametrize("gamma", [*range(10), 0.5, 2.5])
def test_the_focal_part_has_every_exponent(gamma):
    # Whole exponents up to 8 are multiplied out.
    expected = (0.5**gamma * -math.log(0.5) + 0.8**gamma * -math.log(0.2)) / 2
    assert value(FocalDiceLoss(gamma=gamma, alpha=1), TARGETS, PREDICTED) == pytest.approx(expected, rel=1e-5)


def test_missed_pixels_weigh_as_told_by_hand():
    # Missed and superfluous: class 1 has 0.5 and 0.1, class 3 has 0.8 and none; 0 and 2 are superfluous altogether.
    by_class = [
        (0 + 2) / (0 + 0.4 * 0.55 + 2),
        (2 * 0.5 + 2) / (2 * 0.5 + 0.4 * 0.1 + 1.6 * 0.5 + 2),
        (0 + 2) / (0 + 0.4 * 0.65 + 2),
        (2 * 0.2 + 2) / (2 * 0.2 + 1.6 * 0.8 + 2),
    ]
    loss = FocalDiceLoss(alpha=0, smooth=2, dice_over="classes", missed_weight=0.8)
    assert value(loss, TARGETS, PREDICTED) == pytest.approx(1 - sum(by_class) / 4, rel=1e-5)


@given(seed=st.integers(0, 2**32 - 1), missed_weight=st.floats(0.01, 0.99))
@settings(max_examples=20, deadline=None)
def test_missed_weight_changes_nothing_pooled(seed, missed_weight):
    targets, predicted = random_batch(seed)
    weighted = value(FocalDiceLoss(alpha=0, missed_weight=missed_weight), targets, predicted)
    assert weighted == pytest.approx(value(FocalDiceLoss(alpha=0), targets, predicted), rel=1e-5)


def boundary_part(targets, predicted, width) -> float:
    """The boundary part alone, without the rest of the loss."""
    rest = value(FocalDiceLoss(), targets, predicted)
    return value(FocalDiceLoss(boundary_weight=1, boundary_width=width), targets, predicted) - rest


def test_the_boundary_part_by_hand():
    # Of a 3 x 6 slice, a single pixel of class 2 at the right end of the upper row. p = 1 / (2 + row + 10 * column).
    targets = np.zeros((1, 3, 6), np.uint8)
    targets[0, 0, 5] = 2
    rows, columns = np.indices((3, 6))
    p = 1 / (2 + rows + 10 * columns)
    predicted = np.zeros((1, 3, 6, 4), np.float32)
    predicted[0, ..., 1] = 1 - p
    np.put_along_axis(predicted, targets[..., None].astype(int), p[None, ..., None].astype(np.float32), axis=-1)
    # Within 1: two rows, two columns. Within 2: all rows, three columns.
    within_1 = [math.log(2 + row + 10 * column) for row in (0, 1) for column in (4, 5)]
    within_2 = [math.log(2 + row + 10 * column) for row in (0, 1, 2) for column in (3, 4, 5)]
    assert boundary_part(targets, predicted, 1) == pytest.approx(sum(within_1) / 4, rel=1e-5)
    assert boundary_part(targets, predicted, 2) == pytest.approx(sum(within_2) / 9, rel=1e-5)


@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_the_boundary_part_is_the_mean_over_pixels_near_another_class(seed, width):
    rng = np.random.default_rng(seed)
    _, predicted = random_batch(seed, (2, 5, 7))
    # The second slice is of one class: neighbours are sought within slices, not across them.
    targets = np.stack([(rng.random((5, 7)) < 0.05) * 3, np.full((5, 7), rng.integers(4))]).astype(np.uint8)
    costs = [
        -math.log(max(predicted[n, i, j, targets[n, i, j]], 1e-7))
        for n, i, j in np.ndindex(targets.shape)
        if len(np.unique(targets[n, max(i - width, 0) : i + width + 1, max(j - width, 0) : j + width + 1])) > 1
    ]
    expected = sum(costs) / max(len(costs), 1)
    assert boundary_part(targets, predicted, width) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_without_borders_there_is_no_boundary_part():
    targets = np.full((2, 3, 5), 2, np.uint8)
    assert boundary_part(targets, random_batch(0)[1], 2) == 0


def test_the_boundary_part_is_added_with_its_weight():
    targets, predicted = random_batch(1)
    loss = value(FocalDiceLoss(alpha=0.3, boundary_weight=0.25), targets, predicted)
    rest = value(FocalDiceLoss(alpha=0.3), targets, predicted)
    assert loss == pytest.approx(rest + 0.25 * boundary_part(targets, predicted, 2), rel=1e-5)


@pytest.mark.parametrize(("stride", "rows", "columns"), [(2, [1, 3], [1, 3, 5]), (3, [1, 4], [1, 4, 7])])
def test_coarser_predictions_meet_the_targets_at_the_centre_of_each_block(stride, rows, columns):
    targets = np.random.default_rng(stride).integers(0, 4, (2, 2 * stride, 3 * stride)).astype(np.uint8)
    _, predicted = random_batch(stride, (2, 2, 3))
    centres = targets[:, rows][:, :, columns]
    loss = FocalDiceLoss(**EVERYTHING)
    assert value(loss, targets, predicted) == value(loss, centres, predicted)


@pytest.mark.parametrize("size", [(2, 2), (3, 3), (4, 3), (8, 12), (5, 6)])
def test_predictions_at_no_whole_stride_are_refused(size):
    message = rf"targets of size \[4, 6\] beside predictions of size \[{size[0]}, {size[1]}\]; expected the same whole"
    with pytest.raises(ValueError, match=message):
        FocalDiceLoss()(np.zeros((1, 4, 6), np.uint8), random_batch(0, (1, *size))[1])


def test_parts_are_weighted_by_alpha():
    focal, dice = (value(FocalDiceLoss(alpha=alpha), TARGETS, PREDICTED) for alpha in (1, 0))
    assert value(FocalDiceLoss(), TARGETS, PREDICTED) == pytest.approx(0.6 * focal + 0.4 * dice, rel=1e-5)


def test_defaults_are_those_of_the_papers_text():
    config = FocalDiceLoss().get_config()
    assert (config["gamma"], config["alpha"], config["smooth"], config["dice_over"]) == (4, 0.6, 1, "pooled")
    assert (config["missed_weight"], config["boundary_weight"]) == (0.5, 0)


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


@pytest.mark.parametrize("gamma", [0, 0.4, 1, 4])
@pytest.mark.parametrize("dice_over", ["pooled", "classes"])
def test_certainty_right_or_wrong_leaves_loss_and_gradient_finite(gamma, dice_over):
    # The gradient as training takes it: a net that outputs 0 and 1 exactly, one pixel right, one wrong.
    targets = np.array([[[1, 3]]], np.uint8)
    loss = FocalDiceLoss(gamma=gamma, dice_over=dice_over, missed_weight=0.7, boundary_weight=0.5)
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
    loss = FocalDiceLoss(alpha=0.3, smooth=5, **EVERYTHING)
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
        ({"missed_weight": 0}, "loss.missed_weight is 0; expected a weight between 0 and 1"),
        ({"missed_weight": 1}, "loss.missed_weight is 1; expected a weight between 0 and 1"),
        ({"boundary_weight": -0.5}, "loss.boundary_weight is -0.5; expected 0"),
        ({"boundary_width": 0}, "loss.boundary_width is 0; expected a whole number of pixels from 1"),
        ({"boundary_width": 1.5}, "loss.boundary_width is 1.5; expected a whole number of pixels from 1"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FocalDiceLoss(**arguments)


# Two replicas whose halves of the batch have different classes, and borders in the first only. Two outputs, each with
# its loss: the replicas must not mix up their sums either.
TWO_DEVICES = """
import contextlib, json, sys
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from lumbarflow.backend import load_keras
keras = load_keras()
from lumbarflow.losses import FocalDiceLoss
import numpy as np

images = np.random.default_rng(0).normal(size=(4, 6, 8, 1)).astype("float32")
labels = np.zeros((4, 6, 8), "uint8")
labels[:2, 3:5, 3:] = 1
labels[2:] = [[[2]], [[3]]]
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def step(scope):
    keras.utils.set_random_seed(3)
    with scope:
        inputs = keras.Input((6, 8, 1))
        x = keras.layers.Conv2D(5, 3, padding="same", activation="tanh")(inputs)
        fine = keras.layers.Conv2D(4, 1, activation="softmax")(x)
        coarse = keras.layers.Conv2D(4, 2, strides=2, activation="softmax")(x)
        model = keras.Model(inputs, [fine, coarse])
        losses = [FocalDiceLoss(), FocalDiceLoss(**json.loads(sys.argv[1]))]
        model.compile(keras.optimizers.SGD(0.5), loss=losses, loss_weights=[1, 0.5])
    before = model.get_weights()
    history = model.fit(images, [labels, labels], batch_size=4, shuffle=False, verbose=0)
    change = np.concatenate([(b - a).ravel() for a, b in zip(before, model.get_weights())])
    return [history.history["loss"][0], change.tolist()]


print(json.dumps([strategy.num_replicas_in_sync, step(strategy.scope()), step(contextlib.nullcontext())]))
"""


def test_two_devices_step_as_one_does():
    replicas, (two_loss, two_change), (one_loss, one_change) = run_python(
        TWO_DEVICES, json.dumps(EVERYTHING), KERAS_BACKEND="tensorflow"
    )
    assert replicas == 2
    assert two_loss == pytest.approx(one_loss, rel=1e-5)
    np.testing.assert_allclose(two_change, one_change, atol=1e-5)
    assert np.abs(one_change).max() > 1e-2


ONE_LOSS = """
import json, sys
import numpy as np
from lumbarflow.losses import FocalDiceLoss, keras
arrays = np.load(sys.argv[1])
losses = [FocalDiceLoss(**settings)(arrays["targets"], arrays["predicted"]) for settings in json.loads(sys.argv[2])]
print(json.dumps([keras.config.backend(), [float(loss) for loss in losses]]))
"""


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_jax_computes_the_same_loss(tmp_path):
    # Predictions at stride 2, so that every branch is taken.
    targets, _ = random_batch(0, (3, 8, 12))
    _, predicted = random_batch(1, (3, 4, 6))
    np.savez(tmp_path / "batch.npz", targets=targets, predicted=predicted)
    all_settings = [{}, {"gamma": 2.5}, EVERYTHING, {**EVERYTHING, "boundary_width": 2}]
    backend, losses = run_python(
        ONE_LOSS, tmp_path / "batch.npz", json.dumps(all_settings), KERAS_BACKEND="jax", JAX_PLATFORMS="cpu"
    )
    assert backend == "jax"
    here = [value(FocalDiceLoss(**settings), targets, predicted) for settings in all_settings]
    assert losses == pytest.approx(here, rel=1e-5)


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
