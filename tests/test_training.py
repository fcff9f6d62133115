from __future__ import annotations

import errno
import json
import logging
import math
import resource
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from lumbarflow import epochs, models, progress, training
from lumbarflow.backend import load_keras
from lumbarflow.batches import SliceBatches
from lumbarflow.checkpoint import Checkpoint
from lumbarflow.files import held_alone
from lumbarflow.model_input import FORMAT_VERSION, ModelInput
from lumbarflow.networks import load_model, save_model
from lumbarflow.training import fit

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
        "content_hash": "abc",
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


def one_layer_normalised(size, channels, classes, *, precision):
    """The same with moving averages: all kinds of variables that a net can have."""
    keras = load_keras()
    x = inputs = keras.Input((*size, channels))
    x = keras.layers.Conv2D(8, 1)(x)
    x = keras.layers.BatchNormalization(momentum=0.5)(x)
    x = keras.layers.Dropout(0.1)(x)
    x = keras.layers.Conv2D(classes, 1, activation="softmax")(x)
    return keras.Model(inputs, x, name="one_layer_normalised")


@pytest.fixture
def quick(monkeypatch) -> dict:
    for build in (one_layer, one_layer_normalised):
        monkeypatch.setitem(models.MODELS, build.__name__, models.Entry(build.__name__, "One layer", build))
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

    def recording(self, position, place, epoch):
        if self.shuffle:
            read.append((epoch, position))
        return read_slice(self, position, place, epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SliceBatches, "_slice", recording)
        for logger in (training.logger, epochs.logger):
            patch.setattr(logger, "info", lambda line, *values: lines.append(line % values))
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
    expected = SliceBatches(run["model_input"], "train", 2, shuffle=True)
    orders = []
    for epoch in range(3):
        expected.epoch = epoch
        orders += [(epoch, int(position)) for k in range(3) for position in expected.positions(k)]
    # Before the first epoch Keras reads its first two batches, of two slices each, to learn their shapes.
    assert run["read"] == orders[:4] + orders


def test_cosine_schedule_ends_at_0(run):
    rates = [entry["learning_rate"] for entry in run["result"].history]
    # After a third, two thirds and all of the steps: (1 + cos 60) / 2, (1 + cos 120) / 2, (1 + cos 180) / 2.
    assert np.allclose(rates, [0.0075, 0.0025, 0], atol=1e-6)


def test_each_epoch_is_one_log_line(run):
    first, *epochs = run["lines"]
    assert "training modified_unet" in first
    assert "on 5 slices, validation on 3, of 16 x 24 pixels" in first
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


def test_the_output_folder_holds_the_best_net_and_the_checkpoint(run):
    output = run["root"] / "output"
    assert sorted(path.name for path in output.iterdir()) == ["best.keras", "checkpoint.npz"]
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
    with caplog.at_level(logging.INFO, "lumbarflow"):
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
    code = "import sys; from lumbarflow.networks import load_model; print(load_model(sys.argv[1]).count_params())"
    told = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "atlas.keras"], capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == [str(3 * 5 * 5)]


def test_an_atlas_takes_no_neighbours(model_input):
    result = fit(model_input, settings(model={"name": "atlas"}, neighbours=2))
    assert result.model.input_shape == (None, *SIZE, 1)


def test_an_atlas_knows_its_settings_by_name(model_input):
    with pytest.raises(ValueError, match=r"unknown setting model.width; expected some of \['name', 'maximum_shift'\]"):
        fit(model_input, settings(model={"name": "atlas", "width": 3}))


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


def test_a_validation_loss_that_is_not_finite_stops_with_epoch_and_slices(tmp_path, quick):
    images, labels = draw_slices(6, 0)
    images[4] = np.nan
    prepared = write_model_input(tmp_path, {"a": ("train", *draw_slices(2, 0)), "b": ("validation", images, labels)})
    where = r"^epoch 1, batch 3 of 3 \(b slice 4, b slice 5\): the validation loss is nan; expected a finite number"
    with pytest.raises(FloatingPointError, match=where):
        fit(prepared, settings(model=quick, batch_size=2))
    assert not progress._loops


@pytest.mark.parametrize("side", ["train", "validation"])
@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
@pytest.mark.parametrize("left", [None, 0, 300])
def test_a_folder_that_was_not_copied_whole_is_seen_before_anything_is_trained(tmp_path, side, name, left):
    prepared = write_model_input(tmp_path, {side[0]: (side, *draw_slices(3, 0)) for side in ("train", "validation")})
    path = prepared.root / "series" / side[0] / name
    if left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=rf"{side[0]}/{name}: it cannot be read .*; expected an array \(3, .*Copy the"):
        fit(prepared, {"training": {"epochs": 1}})


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
            r"unknown setting loss.beta; expected some of \['gamma', 'alpha', 'smooth', 'dice_over'",
        ),
        ({"training": {"epoch": 3}}, r"unknown setting training.epoch; expected some of \['seed', 'epochs'"),
        ({"augmentation": {"rotate": 3}}, r"unknown setting augmentation.rotate; expected some of \['enabled'"),
        ({"training": {"epochs": 0}}, "training.epochs is 0; expected more than 0"),
        ({"training": {"learning_rate": -1}}, "training.learning_rate is -1; expected more than 0"),
        ({"training": {"learning_rate_schedule": "step"}}, "learning_rate_schedule is 'step'; expected one of"),
        ({"training": {"precision": "half"}}, "training.precision is 'half'; expected one of"),
        ({"training": {"devices": 99}}, "training.devices is 99; expected at most 1, the CPUs that tensorflow sees"),
    ],
)
def test_settings_that_make_no_sense_are_refused(model_input, changes, message):
    with pytest.raises(ValueError, match=message):
        fit(model_input, changes)


# --- stop and go on


class Stopped(Exception):
    pass


def stopping_after(epoch):
    def follow(record):
        if record["epoch"] == epoch:
            raise Stopped

    return follow


def everything(**overrides):
    """Settings that use all that a checkpoint has to remember."""
    return settings(
        epochs=4,
        learning_rate_schedule="cosine",
        warmup_epochs=1,
        weight_decay=1e-2,
        ema_momentum=0.8,
        augmentation={"rotation_degrees": 5},
        **overrides,
    )


def test_an_interrupted_training_ends_with_the_weights_of_a_whole_one(model_input, tmp_path, quick):
    chosen = everything(model={"name": "one_layer_normalised"})
    whole = fit(model_input, chosen, output=tmp_path / "whole")
    told = []
    for epoch in (1, 3):
        with pytest.raises(Stopped):
            fit(model_input, chosen, output=tmp_path / "parts", on_epoch=stopping_after(epoch))
    parts = fit(model_input, chosen, output=tmp_path / "parts", on_epoch=told.append)
    assert same_weights(whole.model, parts.model)
    assert [entry["epoch"] for entry in told] == [1, 2, 3, 4], "whoever follows gets the whole curve"
    for name in ("loss", "val_loss", "val_mean_iou", "learning_rate"):
        assert [entry[name] for entry in parts.history] == [entry[name] for entry in whole.history]
    assert parts.best_epoch == whole.best_epoch
    assert same_weights(load_model(tmp_path / "parts" / "best.keras"), whole.model)


def test_a_finished_training_is_not_repeated(model_input, tmp_path, quick, monkeypatch):
    first = fit(model_input, settings(model=quick, epochs=2), output=tmp_path / "output")
    monkeypatch.setattr(training.keras.Model, "fit", None)
    again = fit(model_input, settings(model=quick, epochs=2), output=tmp_path / "output")
    assert same_weights(first.model, again.model)
    assert (again.history, again.best_epoch, again.stopped_by) == (first.history, first.best_epoch, "epochs")


def test_patience_is_remembered(tmp_path, quick):
    images, labels = draw_slices(8, 0)
    prepared = write_model_input(
        tmp_path / "in", {"a": ("train", images, labels), "b": ("validation", images, (labels + 1) % 4)}
    )
    chosen = settings(model=quick, epochs=40, patience=3, learning_rate=0.03)
    whole = fit(prepared, chosen)
    with pytest.raises(Stopped):
        fit(prepared, chosen, output=tmp_path / "out", on_epoch=stopping_after(whole.best_epoch + 1))
    parts = fit(prepared, chosen, output=tmp_path / "out")
    assert (len(parts.history), parts.best_epoch, parts.stopped_by) == (
        len(whole.history),
        whole.best_epoch,
        "patience",
    )
    assert same_weights(parts.model, whole.model)


def test_a_budget_that_was_too_small_can_be_raised(model_input, tmp_path, quick):
    output = tmp_path / "output"
    first = fit(model_input, settings(model=quick, epochs=3, max_minutes=1e-4), output=output)
    assert (len(first.history), first.stopped_by) == (1, "max_minutes")
    rest = fit(model_input, settings(model=quick, epochs=3), output=output)
    assert (len(rest.history), rest.stopped_by) == (3, "epochs")
    assert same_weights(rest.model, fit(model_input, settings(model=quick, epochs=3)).model)


def test_the_checkpoint_of_another_training_is_not_taken(model_input, tmp_path, quick):
    output = tmp_path / "output"
    fit(model_input, settings(model=quick), output=output)
    with pytest.raises(
        ValueError, match=r"checkpoint.npz: the checkpoint of another training \(\w{8}: other slices or"
    ):
        fit(model_input, settings(model=quick, seed=1), output=output)
    other = fit(model_input, settings(model=quick, seed=1, resume=False), output=output)
    assert same_weights(other.model, fit(model_input, settings(model=quick, seed=1)).model)


def test_what_other_code_has_trained_is_trained_anew(model_input, tmp_path, quick, monkeypatch, caplog):
    output, code = tmp_path / "output", training.training_code
    first = fit(model_input, settings(model=quick), output=output)
    # Another minor version of Python reads the same bytes into another syntax tree: that is the same code.
    monkeypatch.setattr(training, "training_code", lambda build: code(build) | {"syntax": "other"})
    assert fit(model_input, settings(model=quick), output=output).history == first.history
    assert "made by other code" not in caplog.text
    monkeypatch.setattr(training, "training_code", lambda build: {"syntax": "other", "bytes": "other"})
    again = fit(model_input, settings(model=quick), output=output)
    assert "made by other code than today's; training anew" in caplog.text
    assert again.history != first.history, "seconds are never the same twice"


def test_a_training_goes_on_in_the_precision_that_it_began_in(model_input, tmp_path, quick):
    output, chosen = tmp_path / "output", {"model": TINY_NET, "epochs": 2, "precision": "auto"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lumbarflow.backend.BFLOAT16_CPU_FLAGS", frozenset({"fpu"}))
        with pytest.raises(Stopped):
            fit(model_input, settings(**chosen), output=output, on_epoch=stopping_after(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lumbarflow.backend.BFLOAT16_CPU_FLAGS", frozenset())
        for _ in range(2):  # on after one epoch, and taken up when it is finished
            result = fit(model_input, settings(**chosen), output=output)
            assert result.hardware["precision"] == "mixed_bfloat16"
            assert "bfloat16" in {layer.compute_dtype for layer in result.model.layers}


def test_what_is_written_beside_a_net_is_written_once(tmp_path):
    (tmp_path / "out").mkdir()
    first = training.keep_record({"weights": "w", "git_commit": "a"}, tmp_path / "out")
    assert training.keep_record({"weights": "w", "git_commit": "b"}, tmp_path / "out") == first
    assert training.keep_record({"weights": "v", "git_commit": "b"}, tmp_path / "out")["git_commit"] == "b"
    # More epochs that brought no better net are told all the same.
    for count, reason in ((5, "max_minutes"), (9, "max_minutes"), (9, "patience")):
        record = {"weights": "v", "epochs": count, "stopped_by": reason}
        assert training.keep_record(record, tmp_path / "out") == record


def test_a_checkpoint_of_another_net_is_refused(model_input, tmp_path, quick, monkeypatch):
    output = tmp_path / "output"
    with pytest.raises(Stopped):
        fit(model_input, settings(model=quick, epochs=2), output=output, on_epoch=stopping_after(1))

    def wider(size, channels, classes, *, precision):
        keras = load_keras()
        inputs = keras.Input((*size, channels))
        return keras.Model(inputs, keras.layers.Conv2D(classes, 3, padding="same", activation="softmax")(inputs))

    code = training.training_code(one_layer)
    monkeypatch.setattr(training, "training_code", lambda build: code)
    monkeypatch.setitem(models.MODELS, "one_layer", models.Entry("one_layer", "One layer", wider))
    with pytest.raises(ValueError, match="its variables are not those of this net; expected the same"):
        fit(model_input, settings(model=quick, epochs=2), output=output)


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(model_input, tmp_path, quick, monkeypatch):
    output, write = tmp_path / "output", Checkpoint.write

    def full(self, path):
        if len(self.progress["history"]) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, path)

    monkeypatch.setattr(Checkpoint, "write", full)
    message = (
        r"the checkpoint of epoch 2 cannot be written \(No space left on device\); expected room for 1 MiB. The "
        r"checkpoint of epoch 1 is whole: make room and give the same command again, which goes on from there.*npz"
    )
    with pytest.raises(OSError, match=message):
        fit(model_input, settings(model=quick, epochs=3), output=output)
    monkeypatch.setattr(Checkpoint, "write", write)
    rest = fit(model_input, settings(model=quick, epochs=3), output=output)
    assert same_weights(rest.model, fit(model_input, settings(model=quick, epochs=3)).model)


def test_too_little_memory_says_what_to_lower(model_input, quick, monkeypatch):
    class ResourceExhaustedError(Exception):
        pass

    for error in (MemoryError(), ResourceExhaustedError("OOM when allocating"), RuntimeError("RESOURCE_EXHAUSTED: 9G")):

        def fails(*args, error=error, **kwargs):
            try:
                raise error
            finally:
                raise TypeError("Keras tidied up")

        monkeypatch.setattr(training.keras.Model, "fit", fails)
        with pytest.raises(MemoryError, match=r"batches of 2 slices of 16 x 24 .* Lower training.batch_size, or"):
            fit(model_input, settings(model=quick))


def test_other_errors_of_a_step_stay_what_they_are(model_input, quick, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("another one")

    monkeypatch.setattr(training.keras.Model, "fit", fails)
    with pytest.raises(RuntimeError, match="another one"):
        fit(model_input, settings(model=quick))


# --- techniques


def test_the_average_of_the_weights_is_what_is_validated_and_returned(model_input, quick, monkeypatch):
    # Each epoch is one step, and each epoch's net counts as better than the last.
    evaluate, scored = training.keras.Model.evaluate, []

    def rising(self, *args, **kwargs):
        scored.append(self)
        return evaluate(self, *args, **kwargs) | {"mean_iou": len(scored)}

    monkeypatch.setattr(training.keras.Model, "evaluate", rising)
    normalised = {"name": "one_layer_normalised"}
    chosen = {"model": normalised, "epochs": 2, "batch_size": 5, "patience": 9}
    first = fit(model_input, settings(**chosen | {"epochs": 1})).model
    second = fit(model_input, settings(**chosen)).model
    averaged = fit(model_input, settings(**chosen, ema_momentum=0.75))
    assert averaged.best_epoch == 2
    for variable, a, b, average in zip(
        second.weights, first.get_weights(), second.get_weights(), averaged.model.get_weights(), strict=True
    ):
        # The average begins with the first step's weights. Moving averages of the batches are taken as they are.
        expected = b if "moving" in variable.name else 0.75 * a + 0.25 * b
        np.testing.assert_allclose(average, expected, atol=1e-6)
    images, labels = SliceBatches(model_input, "validation", 3)[0]
    validated = float(training.FocalDiceLoss()(labels, averaged.model.predict(images, verbose=0)))
    # Batches of 5: all of the validation slices at once.
    assert averaged.history[1]["val_loss"] == pytest.approx(validated, rel=1e-5)


def test_warm_up_rises_and_then_the_cosine_falls(model_input, quick):
    # 5 slices in batches of 1: 5 steps an epoch, 10 of warm-up, 10 of cosine.
    chosen = settings(model=quick, epochs=4, batch_size=1, learning_rate_schedule="cosine", warmup_epochs=2)
    rates = [entry["learning_rate"] for entry in fit(model_input, chosen).history]
    assert rates == pytest.approx([0.005, 0.01, 0.005, 0.0], abs=1e-6)


def test_weight_decay_shrinks_kernels_and_nothing_else(model_input, quick):
    chosen = {"model": {"name": "one_layer_normalised"}, "epochs": 1, "batch_size": 5, "learning_rate": 0.01}
    plain, decayed = (fit(model_input, settings(**chosen, weight_decay=w)).model for w in (0, 0.5))
    keras = load_keras()
    keras.utils.set_random_seed(0)
    initial = one_layer_normalised(SIZE, 1, 4, precision="float32")
    assert {"kernel", "bias", "gamma", "beta"} <= {variable.name for variable in initial.weights}
    for start, a, b in zip(initial.weights, plain.get_weights(), decayed.get_weights(), strict=True):
        # AdamW takes rate x decay off a kernel before its step, which is Adam's: 0.01 x 0.5. Gammas start at 1.
        expected = 0.005 * np.array(start) if start.name == "kernel" else 0
        np.testing.assert_allclose(a - b, expected, atol=1e-6)


def test_a_net_with_several_outputs_is_served_with_its_first(model_input):
    net = {**TINY_NET, "encoder_widths": [6, 8, 8, 10], "encoder_dropouts": [0] * 4}
    net |= {"decoder_widths": [8, 8], "decoder_dropouts": [0, 0], "deep_supervision": 1}
    result = fit(model_input, settings(model=net, epochs=2, ema_momentum=0.5))
    assert [tuple(output.shape[1:]) for output in result.model.outputs] == [(*SIZE, 4)]
    assert not any("probabilities_2" in layer.name for layer in result.model.layers)
    assert mean_iou(result.model, model_input) == pytest.approx(
        result.history[result.best_epoch - 1]["val_mean_iou"], rel=1e-5
    )


def test_neighbouring_slices_are_the_nets_channels(model_input, quick):
    result = fit(model_input, settings(model=quick, neighbours=1, augmentation={"rotation_degrees": 5}))
    assert result.model.input_shape == (None, *SIZE, 3)
    assert math.isfinite(result.history[0]["val_loss"])


# --- the command


def command(folder, output, *arguments, code=None):
    """`python -m lumbarflow.training`, or the same after some code of the test's."""
    start = ["-m", "lumbarflow.training"] if code is None else ["-c", code]
    options = ["--model-input", folder, "--output", output, "--settings", folder / "settings.json", *arguments]
    return [sys.executable, *start, *map(str, options)]


@pytest.fixture
def prepared(model_input):
    (model_input.root / "settings.json").write_text(json.dumps(everything()))
    return model_input


# Epochs that last, so that the signal comes in the middle of one.
SLOW = """
import sys, time
from lumbarflow import epochs, training

def slowly(self, batch, logs=None):
    time.sleep(0.3)

epochs.Epochs.on_train_batch_begin, begin = (
    lambda self, batch, logs=None: (slowly(self, batch), begin(self, batch, logs)), epochs.Epochs.on_train_batch_begin
)
sys.exit(training.main())
"""
KILLED_WHILE_IT_WRITES = """
import os, signal, sys
import numpy as np
from lumbarflow import training

def half(file, **arrays):
    file.write(b"PK half of it")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

np.savez = half
sys.exit(training.main())
"""


def test_a_killed_command_goes_on_and_ends_like_one_that_was_not(prepared, tmp_path):
    whole = fit(prepared, everything())
    output = tmp_path / "output"

    # In the middle of an epoch, by SIGTERM: the second of four, once the first is there.
    process = subprocess.Popen(command(prepared.root, output, code=SLOW), stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "epoch 1 of 4: loss" in line:
            process.terminate()
            break
    process.stderr.close()
    assert process.wait(timeout=60) == -signal.SIGTERM

    # In the middle of a checkpoint, by SIGKILL.
    done = subprocess.run(command(prepared.root, output, code=KILLED_WHILE_IT_WRITES), capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    reached = len(Checkpoint.read(output / "checkpoint.npz").progress["history"])
    assert 1 <= reached < 4
    assert list(output.glob(".partial-*")), "what was being written is still there"

    done = subprocess.run(command(prepared.root, output), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"going on after epoch {reached} of 4" in done.stderr
    assert sorted(path.name for path in output.iterdir()) == [
        "best.keras", "checkpoint.npz", "training_history.csv", "training_record.json"
    ]  # fmt: skip
    assert same_weights(load_model(output / "best.keras"), whole.model)
    record = json.loads((output / "training_record.json").read_text())
    assert record["best_epoch"] == whole.best_epoch
    assert record["settings"] == everything()
    lines = (output / "training_history.csv").read_text().splitlines()
    assert lines[0].split(",")[:4] == ["epoch", "loss", "val_loss", "val_mean_iou"]
    assert [float(line.split(",")[3]) for line in lines[1:]] == [entry["val_mean_iou"] for entry in whole.history]


def test_a_folder_is_trained_into_by_one_at_a_time(prepared, tmp_path, caplog):
    output = tmp_path / "output"
    with held_alone(output):
        assert training.main(command(prepared.root, output)[3:]) == 1
    assert f"{output}: another process is writing to it; wait for its end" in caplog.text
    assert not output.exists(), "nothing was put into it"


def test_a_file_that_may_not_grow_leaves_the_last_checkpoint(prepared, tmp_path, monkeypatch, caplog):
    # The kernel refuses what a full disk would: the checkpoint of the first epoch fits, and not that of the second.
    write = Checkpoint.write

    def limited(self, path):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if len(self.progress["history"]) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            write(self, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(Checkpoint, "write", limited)
    output = tmp_path / "output"
    assert training.main(command(prepared.root, output)[3:]) == 1
    assert "the checkpoint of epoch 2 cannot be written" in caplog.text
    assert "The checkpoint of epoch 1 is whole" in caplog.text
    assert len(Checkpoint.read(output / "checkpoint.npz").progress["history"]) == 1
    assert not list(output.glob(".partial*"))


def test_the_command_takes_settings_from_several_files(tmp_path, capsys):
    (tmp_path / "a.yml").write_text("training: {epochs: 3, seed: 1}\nloss: {alpha: 0.5}\n")
    # PyYAML reads 1e-3 as a text.
    (tmp_path / "b.json").write_text('{"training": {"epochs": 5, "learning_rate": "1e-3", "precision": "auto"}}')
    read = training.read_settings([tmp_path / "a.yml", tmp_path / "b.json"])
    changed = {"epochs": 5, "learning_rate": 0.001, "precision": "auto"}
    assert read == {"training": {"seed": 1} | changed, "loss": {"alpha": 0.5}}
    for name, text, message in (
        ("c.json", "{", "c.json: not JSON"),
        ("c.yml", "a: [", "c.yml: not YAML"),
        ("d.yml", "training: 3", "d.yml: expected sections with settings"),
        ("e.yml", None, "e.yml: no such file"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            training.read_settings([tmp_path / name])


def test_the_command_ends_with_one_line_where_something_is_missing(tmp_path, caplog):
    assert training.main(["--model-input", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "no manifest.json; expected a model input folder" in caplog.text
    assert not (tmp_path / "out").exists()
