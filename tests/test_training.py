from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from lumbarflow import models, training
from lumbarflow.augmentation import AugmentationSettings
from lumbarflow.backend import load_keras
from lumbarflow.model_input import FORMAT_VERSION, ModelInput
from lumbarflow.training import SliceBatches, fit, load_model, save_model

SIZE = (16, 24)
TINY_NET = {
    "name": "modified_unet",
    "encoder_widths": [6, 8, 10],
    "encoder_dropouts": [0.1, 0.1, 0.1],
    "decoder_widths": [8],
    "decoder_dropouts": [0.1],
    "batch_norm_momentum": 0.5,
}


def draw_slices(n: int, seed: int, size=SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Three rectangles, one of each class, each with its own brightness."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((n, *size), np.uint8)
    for label in labels:
        for c, left in ((1, 1), (2, 9), (3, 17)):
            top = rng.integers(0, size[0] - 8)
            label[top : top + 8, left : left + 6] = c
    images = np.array([-1.0, 0.0, 1.0, 2.0])[labels] + rng.normal(scale=0.1, size=labels.shape)
    return images.astype(np.float16), labels


def write_model_input(root, series: dict[str, tuple[str, np.ndarray, np.ndarray]], size=SIZE) -> ModelInput:
    """series: {name: (side, images, labels)}."""
    sides: dict[str, dict[str, list[int]]] = {"train": {}, "validation": {}, "test": {}}
    for name, (side, images, labels) in series.items():
        folder = root / "series" / name
        folder.mkdir(parents=True)
        np.save(folder / "images.npy", images)
        np.save(folder / "labels.npy", labels)
        sides[side][name] = list(range(len(images)))
    manifest = {
        "format_version": FORMAT_VERSION,
        "size": list(size),
        "classes": {"0": "background", "1": "vertebrae", "2": "canal", "3": "ivd"},
        "series": {name: {"n_slices": len(images)} for name, (_, images, _) in series.items()},
        "sides": sides,
    }
    (root / "manifest.json").write_text(json.dumps(manifest))
    return ModelInput.open(root)


def one_layer(size, channels, classes, *, precision):
    """The least net that learns from brightness and drops out: quick, for what is about the loop and not the net.

    No activation between: TensorFlow's ReLU and tanh can turn NaN into a number, and a batch's NaN must reach its loss.
    """
    keras = load_keras()
    x = inputs = keras.Input((*size, channels))
    x = keras.layers.Conv2D(8, 1)(x)
    x = keras.layers.Dropout(0.1)(x)
    x = keras.layers.Conv2D(classes, 1, activation="softmax")(x)
    return keras.Model(inputs, x, name="one_layer")


@pytest.fixture
def quick(monkeypatch) -> dict:
    monkeypatch.setitem(models.MODELS, "one_layer", models.Entry("one_layer", "One layer", one_layer))
    return {"name": "one_layer"}


def settings(*, model=None, loss=None, augmentation=None, **overrides):
    return {
        "model": model or TINY_NET,
        "loss": loss or {},
        "training": {"epochs": 1, "batch_size": 2, "learning_rate": 0.01, "precision": "float32", **overrides},
        "augmentation": augmentation if augmentation is not None else {"enabled": False},
    }


@pytest.fixture
def model_input(tmp_path) -> ModelInput:
    return write_model_input(
        tmp_path / "model_input",
        {
            "1_t1": ("train", *draw_slices(3, 1)),
            "1_t2": ("train", *draw_slices(2, 2)),
            "2_t2": ("validation", *draw_slices(3, 3)),
        },
    )


def mean_iou(model, model_input, side="validation") -> float:
    """Over the classes that occur, in NumPy."""
    where = model_input.slices(side)
    images = np.stack([model_input.image(*one) for one in where]).astype(np.float32)[..., None]
    labels = np.stack([model_input.label(*one) for one in where])
    predicted = model.predict(images, verbose=0).argmax(-1)
    shared = [((labels == c) & (predicted == c)).sum() for c in range(4)]
    either = [((labels == c) | (predicted == c)).sum() for c in range(4)]
    return float(np.mean([s / e for s, e in zip(shared, either, strict=True) if e]))


def same_weights(first, second) -> bool:
    pairs = zip(first.get_weights(), second.get_weights(), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


# --- one ordinary run, looked at from several sides


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    prepared = write_model_input(
        root / "model_input", {"1_t1": ("train", *draw_slices(5, 1)), "2_t2": ("validation", *draw_slices(3, 2))}
    )
    told = []
    chosen = settings(
        epochs=3, precision="mixed_bfloat16", learning_rate_schedule="cosine", augmentation={"rotation_degrees": 5}
    )
    lines, read, read_slice = [], [], SliceBatches._slice

    def recording(self, position):
        if self.shuffle:
            read.append((self.epoch, int(position)))
        return read_slice(self, position)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SliceBatches, "_slice", recording)
        patch.setattr(training.logger, "info", lambda line, *values: lines.append(line % values))
        result = fit(prepared, chosen, output=root / "output", on_epoch=told.append)
    return {"root": root, "model_input": prepared, "result": result, "told": told, "lines": lines, "read": read}


def test_history_has_one_complete_entry_for_each_epoch(run):
    history = run["result"].history
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    for entry in history:
        assert set(entry) == {
            "epoch",
            "loss",
            "val_loss",
            "val_mean_iou",
            "learning_rate",
            "seconds",
            "slices_per_second",
        }
        assert all(math.isfinite(value) for value in entry.values())
        assert entry["seconds"] > 0
        assert entry["slices_per_second"] > 0
    assert run["told"] == history
    json.dumps(history)


def test_each_epoch_is_read_under_its_own_number_in_its_own_order(run):
    expected = SliceBatches(run["model_input"], "train", 5, shuffle=True)
    orders = []
    for epoch in range(3):
        expected.epoch = epoch
        orders += [(epoch, int(position)) for position in expected.positions(0)]
    # Before the first epoch Keras reads its first two batches, of two slices each, to learn their shapes.
    assert run["read"] == orders[:4] + orders


def test_cosine_schedule_ends_at_0(run):
    rates = [entry["learning_rate"] for entry in run["result"].history]
    # After a third, two thirds and all of the steps: (1 + cos 60) / 2, (1 + cos 120) / 2, (1 + cos 180) / 2.
    assert np.allclose(rates, [0.0075, 0.0025, 0], atol=1e-6)


def test_each_epoch_is_one_log_line(run):
    first, *epochs = run["lines"]
    assert "training modified_unet" in first
    assert "on 5 slices, validation on 3, size [16, 24]" in first
    assert [line.split(":")[0] for line in epochs] == ["epoch 1 of 3", "epoch 2 of 3", "epoch 3 of 3"]


def test_validation_figure_is_the_pooled_mean_iou_of_the_returned_net(run):
    result = run["result"]
    recorded = result.history[result.best_epoch - 1]["val_mean_iou"]
    assert mean_iou(result.model, run["model_input"]) == pytest.approx(recorded, rel=1e-5)


def test_a_saved_net_predicts_identically_after_reload(run):
    images, _ = SliceBatches(run["model_input"], "validation", 3)[0]
    path = run["root"] / "model.keras"
    save_model(run["result"].model, path)
    again = load_model(path)
    assert np.array_equal(again.predict(images, verbose=0), run["result"].model.predict(images, verbose=0))
    assert "bfloat16" in {layer.compute_dtype for layer in again.layers}
    assert not again.compiled
    assert not run["result"].model.compiled


def test_a_net_trained_in_bfloat16_can_compute_in_float32(run):
    images, _ = SliceBatches(run["model_input"], "validation", 3)[0]
    path = run["root"] / "output" / "best.keras"
    trained, plain = load_model(path), load_model(path, precision="float32")
    assert {layer.compute_dtype for layer in plain.layers} == {"float32"}
    assert same_weights(trained, plain)
    difference = np.abs(trained.predict(images, verbose=0) - plain.predict(images, verbose=0)).max()
    assert 0 < difference < 0.05


def test_the_output_folder_holds_the_best_net_and_nothing_else(run):
    output = run["root"] / "output"
    assert [path.name for path in output.iterdir()] == ["best.keras"]
    assert same_weights(load_model(output / "best.keras"), run["result"].model)


def test_a_saved_net_carries_no_optimiser_even_if_compiled(tmp_path, run):
    model = load_model(run["root"] / "output" / "best.keras")
    model.compile("adam", "mse")
    save_model(model, tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        assert json.loads(archive.read("config.json"))["compile_config"] == {}


def test_only_keras_files_are_written_and_read(tmp_path, run):
    with pytest.raises(ValueError, match=r"model.h5: expected a name ending in .keras"):
        save_model(run["result"].model, tmp_path / "model.h5")
    with pytest.raises(ValueError, match="absent.keras: no such file"):
        load_model(tmp_path / "absent.keras")
    with pytest.raises(ValueError, match="precision is 'float64'; expected None"):
        load_model(run["root"] / "output" / "best.keras", precision="float64")


# --- learning, choosing and stopping


def test_it_overfits_one_slice(tmp_path):
    images, labels = draw_slices(1, 0)
    # Repeated, so that an epoch is several steps.
    repeated = np.repeat(images, 16, axis=0), np.repeat(labels, 16, axis=0)
    prepared = write_model_input(tmp_path, {"a": ("train", *repeated), "b": ("validation", images, labels)})
    undropped = {"encoder_dropouts": [0, 0, 0], "decoder_dropouts": [0]}
    result = fit(prepared, settings(model={**TINY_NET, **undropped}, epochs=8))
    assert mean_iou(result.model, prepared) > 0.95


def test_the_best_epochs_weights_are_returned_and_patience_ends_the_run(tmp_path, quick):
    # Validation wants every class to be another one: the better the net learns, the worse it scores.
    images, labels = draw_slices(8, 0)
    prepared = write_model_input(
        tmp_path, {"a": ("train", images, labels), "b": ("validation", images, (labels + 1) % 4)}
    )
    result = fit(prepared, settings(model=quick, epochs=40, patience=15, learning_rate=0.03))
    scores = [entry["val_mean_iou"] for entry in result.history]
    assert result.stopped_by == "patience"
    assert len(scores) == result.best_epoch + 15 < 40
    assert scores[result.best_epoch - 1] == max(scores) > scores[-1]
    assert mean_iou(result.model, prepared) == pytest.approx(max(scores), rel=1e-5)


def test_a_budget_ends_the_run_after_the_epoch(model_input, quick, caplog):
    with caplog.at_level(logging.INFO, "lumbarflow.training"):
        result = fit(model_input, settings(model=quick, epochs=9, max_minutes=1e-4))
    assert (len(result.history), result.stopped_by) == (1, "max_minutes")
    assert "stopped after epoch 1" in caplog.messages[-1]
    assert "training.max_minutes" in caplog.messages[-1]


def test_one_seed_gives_one_net_and_another_seed_another(model_input, quick):
    def trained(seed, augmentation=None):
        return fit(model_input, settings(model=quick, seed=seed, epochs=2, augmentation=augmentation)).model

    first = trained(7, {"rotation_degrees": 5})
    assert same_weights(first, trained(7, {"rotation_degrees": 5}))
    assert not same_weights(first, trained(7, {"enabled": False}))
    assert not same_weights(first, trained(8, {"rotation_degrees": 5}))


# --- a model that is not trained by gradient


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_an_atlas_is_adapted_in_one_epoch_and_saved(model_input, tmp_path, precision):
    told = []
    chosen = settings(model={"name": "atlas", "maximum_shift": 0.1}, epochs=9, batch_size=3, precision=precision)
    result = fit(model_input, chosen, output=tmp_path / "output", on_epoch=told.append)
    assert (len(result.history), result.best_epoch, result.stopped_by) == (1, 1, "adapted")
    assert told == result.history
    (entry,) = result.history
    assert list(entry) == [
        "epoch",
        "loss",
        "val_loss",
        "val_mean_iou",
        "learning_rate",
        "seconds",
        "slices_per_second",
    ]
    assert (entry["epoch"], entry["learning_rate"]) == (1, 0.0)
    assert min(entry["seconds"], entry["slices_per_second"]) > 0
    images, labels = SliceBatches(model_input, "validation", 3)[0]
    assert entry["val_loss"] == pytest.approx(
        float(training.FocalDiceLoss()(labels, result.model.predict(images, verbose=0))), rel=1e-5
    )
    assert entry["val_mean_iou"] == pytest.approx(mean_iou(result.model, model_input), rel=1e-5)
    assert entry["loss"] < entry["val_loss"]
    assert not result.model.compiled
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["best.keras"]
    assert same_weights(load_model(tmp_path / "output" / "best.keras"), result.model)


def test_an_atlas_is_shown_every_training_slice_as_it_is_stored(model_input):
    chosen = settings(model={"name": "atlas", "maximum_shift": 0}, augmentation={"rotation_degrees": 30})
    frequencies = fit(model_input, chosen).model.get_layer("atlas").frequencies
    labels = np.stack([model_input.label(*one) for one in model_input.slices("train")])
    assert np.allclose(frequencies, np.eye(4)[labels].mean(axis=0))


def test_an_atlas_is_read_by_a_process_that_never_built_one(tmp_path):
    # Here its layer is registered already; where a model is pulled, only load_model has been imported.
    save_model(models.build("atlas", (3, 5), 1, 4), tmp_path / "atlas.keras")
    code = "import sys; from lumbarflow.training import load_model; print(load_model(sys.argv[1]).count_params())"
    told = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "atlas.keras"], capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == [str(3 * 5 * 5)]


def test_an_atlas_knows_its_settings_by_name(model_input):
    with pytest.raises(ValueError, match=r"unknown setting model.width; expected some of \['name', 'maximum_shift'\]"):
        fit(model_input, settings(model={"name": "atlas", "width": 3}))


# --- what the net is shown


def test_batches_hold_every_slice_once_and_change_order_with_the_epoch(model_input):
    batches = SliceBatches(model_input, "train", 2, seed=3, shuffle=True)
    orders = []
    for epoch in range(3):
        batches.epoch = epoch
        orders.append(np.concatenate([batches.positions(k) for k in range(len(batches))]).tolist())
    assert [sorted(order) for order in orders] == [[0, 1, 2, 3, 4]] * 3
    assert len({tuple(order) for order in orders}) == 3
    assert [batches[k][0].shape for k in range(3)] == [(2, *SIZE, 1), (2, *SIZE, 1), (1, *SIZE, 1)]


def test_batches_are_the_stored_slices(model_input):
    images, labels = SliceBatches(model_input, "train", 4)[1]
    assert (images.dtype, labels.dtype) == (np.float32, np.uint8)
    assert np.array_equal(images[0, ..., 0], model_input.image("1_t2", 1))
    assert np.array_equal(labels[0], model_input.label("1_t2", 1))


def test_augmentation_follows_from_seed_epoch_and_slice_alone(model_input):
    def batches(seed=0, epoch=0, shuffle=False):
        made = SliceBatches(model_input, "train", 1, seed=seed, shuffle=shuffle, augmentation=AugmentationSettings())
        made.epoch = epoch
        return made

    # Read backwards and in another order, each slice looks the same.
    forwards = [batches()[k] for k in range(5)]
    reading = batches(shuffle=True)
    shuffled = {int(reading.positions(k)[0]): reading[k] for k in reversed(range(5))}
    for position, (images, labels) in enumerate(forwards):
        assert np.array_equal(images, shuffled[position][0])
        assert np.array_equal(labels, shuffled[position][1])
    assert not np.array_equal(batches(epoch=1)[0][0], forwards[0][0])
    assert not np.array_equal(batches(seed=1)[0][0], forwards[0][0])
    assert not np.array_equal(forwards[0][0], SliceBatches(model_input, "train", 1)[0][0])


# --- clean failures


@pytest.mark.parametrize("side", ["train", "validation"])
def test_a_side_without_slices_is_refused(tmp_path, side):
    other = "validation" if side == "train" else "train"
    prepared = write_model_input(tmp_path, {"a": (other, *draw_slices(2, 0))})
    with pytest.raises(ValueError, match=f"the side '{side}' has no slices; expected at least one"):
        fit(prepared, settings())


def test_a_size_that_the_net_cannot_take_is_refused(tmp_path):
    size = (15, 24)
    slices = draw_slices(1, 0, size)
    prepared = write_model_input(tmp_path, {"a": ("train", *slices), "b": ("validation", *slices)}, size)
    with pytest.raises(ValueError, match=r"size \[15, 24\] is not divisible by 2"):
        fit(prepared, settings())


def test_a_loss_that_is_not_finite_stops_with_epoch_and_slice(tmp_path, quick):
    images, labels = draw_slices(4, 0)
    images[2] = np.nan
    prepared = write_model_input(
        tmp_path, {"7_t2": ("train", images, labels), "8_t2": ("validation", *draw_slices(1, 1))}
    )
    where = r"^epoch 1, batch \d of 4 \(7_t2 slice 2\): the loss is nan; expected a finite number"
    with pytest.raises(FloatingPointError, match=where):
        fit(prepared, settings(model=quick, batch_size=1, epochs=2))


def test_a_validation_loss_that_is_not_finite_stops_with_the_epoch(tmp_path, quick):
    images, labels = draw_slices(1, 0)
    images[0] = np.nan
    prepared = write_model_input(tmp_path, {"a": ("train", *draw_slices(2, 0)), "b": ("validation", images, labels)})
    with pytest.raises(FloatingPointError, match="^epoch 1: the validation loss is nan; expected a finite number"):
        fit(prepared, settings(model=quick))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimiser": {}}, r"unknown section 'optimiser' .*expected \['model', 'loss', 'training', 'augmentation'\]"),
        ({"model": {"width": 3}}, r"unknown setting model.width; expected some of \['name', 'encoder_widths'"),
        ({"model": {"name": "vnet"}}, "model.name is 'vnet'; expected one of"),
        # Taken from the manifest, not from the settings.
        ({"model": {"size": [16, 16]}}, r"unknown setting model.size"),
        (
            {"loss": {"beta": 3}},
            r"unknown setting loss.beta; expected some of \['gamma', 'alpha', 'smooth', 'dice_over'\]",
        ),
        ({"training": {"epoch": 3}}, r"unknown setting training.epoch; expected some of \['seed', 'epochs'"),
        ({"augmentation": {"rotate": 3}}, r"unknown setting augmentation.rotate; expected some of \['enabled'"),
        ({"training": {"epochs": 0}}, "training.epochs is 0; expected more than 0"),
        ({"training": {"learning_rate": -1}}, "training.learning_rate is -1; expected more than 0"),
        ({"training": {"learning_rate_schedule": "step"}}, "learning_rate_schedule is 'step'; expected one of"),
        ({"training": {"precision": "half"}}, "training.precision is 'half'; expected one of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(model_input, changes, message):
    with pytest.raises(ValueError, match=message):
        fit(model_input, changes)
