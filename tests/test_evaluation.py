"""From stores of references and predictions to tables, with nets whose answers are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest

from lumbarflow import evaluation, inference, metrics, onnx_network, parallel, uncertainty
from lumbarflow.cohort import Scan, ingest_scan
from lumbarflow.evaluation import Case, evaluate_cases, predicted_cases, prediction_work, read_case
from lumbarflow.imaging import LabelMap
from lumbarflow.labels import LabelTable
from lumbarflow.metrics import class_scores, confusion_matrix
from lumbarflow.model_input import ModelInput
from lumbarflow.onnx_network import OnnxNetwork
from lumbarflow.parallel import Workers
from lumbarflow.store import SeriesStore, Work

SETTINGS = {
    "batch_size": 64,  # all slices at once: the net below scales its greys to what it sees
    "test_time_augmentation": {"shift": 0.0, "rotation_degrees": 0.0},
    "metrics": {"nsd_tolerances_mm": [1.0], "detection_iou": 0.1, "minimum_component_mm3": 0.0},
    "intervals": {"samples": 50, "seed": 0},
}
TABLE = LabelTable({"vertebrae": [1], "canal": [100], "IVD": [201]})
TOLERANCES = {"spacing_mm": 1e-3, "origin_mm": 1e-2, "direction": 1e-4}


class GreyIsClass:
    """Sees the classes in the grey values: 0, 1, 2 or 3 standard steps above the darkest."""

    input_shape = (None, 64, 64, 1)

    def __init__(self):
        self.slices = 0

    def predict(self, net_input, batch_size, verbose):
        self.slices += len(net_input)
        grey = net_input[..., 0]
        nearest = np.abs(grey[..., None] - np.linspace(grey.min(), grey.max(), 4)).argmin(axis=-1)
        return np.eye(4, dtype=np.float32)[nearest] * 0.7 + 0.075


def ids_of(shape):
    """All classes in every sagittal slice (the second array axis of `make_volume`'s oblique direction is not known)."""
    ids = np.zeros(shape, np.uint8)
    ids[1:3, 1:3, 1:3], ids[1:3, 4:6, 1:3], ids[4:6, 1:5, 4:6] = 1, 100, 201
    return ids


@pytest.fixture
def series(tmp_path, make_volume) -> SeriesStore:
    """Two ingested series of two patients, stored obliquely; the image's grey values tell the class."""
    store = SeriesStore(tmp_path / "series")
    work = {}
    for name, shape in (("1_t1", (7, 8, 6)), ("2_t1", (8, 7, 9))):
        ids = ids_of(shape)
        mask = make_volume(shape, kind=LabelMap, dtype=np.uint8, values=ids)
        image = make_volume(shape, values=TABLE.classes(ids).astype(np.int16) * 100)
        scan = Scan(name, name[0], "t1", f"{name}.mha", f"{name}.mha", None)
        work[name] = Work(
            name,
            lambda scan=scan, image=image, mask=mask: ingest_scan(
                scan, lambda: image, lambda: mask, TABLE, TOLERANCES, (0, 100)
            ),
        )
    store.update(work)
    return store


def model_input(series, tested=None) -> ModelInput:
    chosen = {name: tested or list(range(series.record(name)["n_slices"])) for name in series.series()}
    preprocess = {"size": [64, 64], "keep_aspect": True, "normalisation": "z_score", "percentiles": [0, 100]}
    manifest = {"size": [64, 64], "settings": {"preprocess": preprocess}, "sides": {"test": chosen}}
    return ModelInput(series.root.parent, manifest)


def predict(series, tmp_path, tested=None):
    net, loads = GreyIsClass(), []
    data = model_input(series, tested)
    predictions = SeriesStore(tmp_path / "predictions")

    def load():
        loads.append(1)
        return net

    def update():
        return predictions.update(prediction_work(load, "weights", "network", data, series, SETTINGS))

    return data, predictions, update, net, loads


def test_predictions_come_back_in_storage_order_and_are_made_once(series, tmp_path):
    data, predictions, update, net, loads = predict(series, tmp_path)
    assert update().made == ["1_t1", "2_t1"]
    assert len(loads) == 1, "one net serves all series"
    slices = net.slices
    for name in series.series():
        case = read_case(series, predictions, name)
        np.testing.assert_array_equal(case.reference, series.label_map(name, "labels.mha").array)
        # 64 x 64 for 9 x 8 pixels or fewer: the structures come back, all but their borders.
        found = class_scores(confusion_matrix(case.reference, case.prediction))["dice"]
        assert found.min() > 0.6, found
        stored = predictions.label_map(name, "labels.mha")
        raw = TABLE.classes(ids_of(stored.array.shape))
        assert class_scores(confusion_matrix(raw, stored.array))["dice"] == pytest.approx(found), "the file's own order"
        geometry = series.record(name)["geometry"]
        assert list(stored.spacing_mm) == geometry["spacing_mm"]
        np.testing.assert_array_equal(stored.direction, geometry["direction"])
        # y sums to the pixels of the reference's class, p to the image's pixels over all classes.
        overlap = predictions.array(name, "soft_overlap.npy")
        counts = np.array(series.record(name)["class_counts"])
        np.testing.assert_array_equal(overlap[..., 2], counts)
        np.testing.assert_allclose(overlap[..., 1].sum(axis=1), counts.sum(axis=1), rtol=1e-5)
        # No pixel has less than 0.075 of any class: all are counted, for each.
        reliability = predictions.array(name, "reliability.npy").sum(axis=2)
        np.testing.assert_array_equal(reliability[..., 0], np.repeat(counts.sum(axis=1)[:, None], 3, axis=1))
        np.testing.assert_allclose(reliability[..., 1], overlap[:, 1:, 1], rtol=1e-5)
        np.testing.assert_array_equal(reliability[..., 2], counts[:, 1:])
        decided = (case.prediction[..., None] == [1, 2, 3]).sum(axis=(1, 2))
        np.testing.assert_array_equal(predictions.array(name, "entropy.npy")[..., 1], decided)
    assert update().made == []
    assert (net.slices, len(loads)) == (slices, 1)
    for changed in (("other weights", "network"), ("other weights", "other network")):
        again = prediction_work(lambda: net, *changed, data, series, SETTINGS)
        assert predictions.update(again).made == ["1_t1", "2_t1"]
    turned = SETTINGS | {"test_time_augmentation": {"shift": 0.1}}
    again = prediction_work(lambda: net, "other weights", "other network", data, series, turned)
    assert predictions.update(again).made == ["1_t1", "2_t1"]
    # The figures' settings do not touch predictions.
    again = prediction_work(lambda: net, "other weights", "other network", data, series, turned | {"metrics": {}})
    assert predictions.update(again).made == []


def test_cases_are_the_manifests_test_slices_with_their_spacing(series, tmp_path):
    data, predictions, update, *_ = predict(series, tmp_path, tested=[2, 4])
    update()
    cases = [read() for read in predicted_cases(data.manifest, series, predictions).values()]
    assert [(case.series, case.patient, case.tested.tolist()) for case in cases] == [
        ("1_t1", "1", [2, 4]),
        ("2_t1", "2", [2, 4]),
    ]
    column, row, slice_spacing = series.label_map("1_t1", "labels.mha").spacing_mm
    assert cases[0].spacing_mm == (slice_spacing, row, column)
    assert len({round(length, 3) for length in cases[0].spacing_mm}) == 3
    whole = read_case(series, predictions, "1_t1")
    assert whole.tested.tolist() == list(range(len(whole.reference)))


def test_entropy_and_reliability_are_of_the_tested_slices(series, tmp_path):
    data, predictions, update, *_ = predict(series, tmp_path, tested=[2, 4])
    update()
    evaluated = evaluate_cases(predicted_cases(data.manifest, series, predictions), SETTINGS)
    by_case = evaluated.by_case.set_index(["series", "class"])["entropy"]
    reliability = np.zeros((3, uncertainty.BINS, 3))
    for name in series.series():
        sums, pixels = predictions.array(name, "entropy.npy")[[2, 4]].sum(axis=0).T
        found = by_case.loc[name]
        np.testing.assert_allclose(found[["vertebrae", "canal", "IVD"]], sums / np.where(pixels, pixels, np.nan))
        assert np.isnan(found["background"])
        reliability += predictions.array(name, "reliability.npy")[[2, 4]].sum(axis=0)
    np.testing.assert_array_equal(evaluated.reliability, reliability)
    # The net gives 0.775 to what it decides, or less where it was interpolated; never more, and never nothing.
    belief = np.array([0.775, 0.075, 0.075, 0.075])
    least = -(belief * np.log(belief)).sum() / np.log(4)
    assert by_case.dropna().between(least - 1e-6, 1).all() and by_case.notna().any()


def test_entropy_is_of_what_was_decided_and_reliability_against_the_reference(series, tmp_path):
    class DiscsAreVertebrae(GreyIsClass):
        def predict(self, net_input, batch_size, verbose):
            return super().predict(net_input, batch_size, verbose)[..., [0, 3, 2, 1]]

    predictions = SeriesStore(tmp_path / "predictions")
    work = prediction_work(DiscsAreVertebrae, "weights", "network", model_input(series), series, SETTINGS)
    predictions.update(work)
    for name in series.series():
        case, counts = read_case(series, predictions, name), np.array(series.record(name)["class_counts"])
        decided = (case.prediction[..., None] == [1, 2, 3]).sum(axis=(1, 2))
        assert np.any(decided != counts[:, 1:])
        np.testing.assert_array_equal(case.entropy[..., 1], decided)
        np.testing.assert_array_equal(case.reliability.sum(axis=2)[..., 2], counts[:, 1:])


def test_predictions_without_probabilities_have_neither_entropy_nor_reliability(series, tmp_path):
    data, predictions, update, *_ = predict(series, tmp_path)
    update()
    with_both = evaluate_cases(predicted_cases(data.manifest, series, predictions), SETTINGS)
    # As of an earlier version of one of them, and as of another tool.
    predictions.path("1_t1", "entropy.npy").unlink()
    predictions.path("1_t1", "reliability.npy").unlink()
    case = read_case(series, predictions, "1_t1")
    assert case.entropy is None and case.reliability is None and case.soft_overlap is not None
    evaluated = evaluate_cases(predicted_cases(data.manifest, series, predictions), SETTINGS)
    entropy = evaluated.by_case.set_index("series")["entropy"]
    assert entropy["1_t1"].isna().all() and entropy["2_t1"].notna().any()
    of_the_other = predictions.array("2_t1", "reliability.npy").sum(axis=0)
    np.testing.assert_array_equal(evaluated.reliability, of_the_other)
    figures = [name for name in evaluated.by_case if name != "entropy"]
    assert evaluated.by_case[figures].equals(with_both.by_case[figures])
    cases = (read() for read in predicted_cases(data.manifest, series, predictions).values())
    evaluated = evaluate_cases(to_read(*(replace(case, entropy=None, reliability=None) for case in cases)), SETTINGS)
    assert evaluated.by_case["entropy"].isna().all() and not evaluated.reliability.any()


@pytest.mark.parametrize("module", [inference, metrics, onnx_network, uncertainty])
def test_what_other_code_has_stored_is_made_again(series, tmp_path, monkeypatch, module):
    _, _, update, *_ = predict(series, tmp_path)
    update()
    monkeypatch.setattr(module, "__file__", evaluation.__file__)
    assert update().made == ["1_t1", "2_t1"]


def test_what_another_conversion_of_nets_has_stored_is_made_again(series, tmp_path, monkeypatch):
    _, _, update, *_ = predict(series, tmp_path)
    update()
    # The module is found beside this one: loaded, it would bring Keras.
    (tmp_path / "networks.py").write_text("to_onnx = None")
    monkeypatch.setattr(evaluation, "__file__", str(tmp_path / "evaluation.py"))
    assert update().made == ["1_t1", "2_t1"]


def test_another_side_can_be_predicted_and_scored_without_the_test_patients(series, tmp_path):
    manifest = model_input(series).manifest | {"sides": {"train": {}, "validation": {"2_t1": [1, 3]}, "test": {}}}
    manifest["sides"]["test"] = {"1_t1": [0, 2]}
    data, predictions = ModelInput(series.root.parent, manifest), SeriesStore(tmp_path / "predictions")
    work = prediction_work(GreyIsClass, "weights", "network", data, series, SETTINGS, side="validation")
    assert predictions.update(work).made == ["2_t1"]
    cases = [read() for read in predicted_cases(manifest, series, predictions, side="validation").values()]
    assert [(case.series, case.tested.tolist()) for case in cases] == [("2_t1", [1, 3])]
    assert list(prediction_work(GreyIsClass, "weights", "network", data, series, SETTINGS)) == ["1_t1"]


def test_an_unknown_side_is_named(series):
    data = model_input(series)
    with pytest.raises(ValueError, match=r"side is 'val'; expected one of train, validation, test"):
        prediction_work(GreyIsClass, "weights", "network", data, series, SETTINGS, side="val")
    with pytest.raises(ValueError, match=r"side is 'val'; expected one of train, validation, test"):
        predicted_cases(data.manifest, series, series, side="val")


def case(name, patient, reference, prediction, **more) -> Case:
    return Case(name, patient, reference, prediction, (4.0, 0.5, 0.8), np.arange(len(reference)), **more)


def to_read(*cases: Case) -> dict[str, Callable[[], Case]]:
    return {case.series: partial(replace, case) for case in cases}


def blocks() -> tuple[np.ndarray, np.ndarray]:
    reference = np.zeros((2, 10, 8), np.uint8)
    reference[:, 1:5, 1:4], reference[:, 1:5, 5:7], reference[:, 6:9, 1:4] = 1, 2, 3
    worse = reference.copy()
    worse[:, 1:3, 1:4] = 0  # half of the vertebra
    return reference, worse


def test_tables_of_two_patients_by_hand():
    reference, worse = blocks()
    evaluated = evaluate_cases(
        to_read(case("a_t1", "a", reference, reference), case("b_t1", "b", reference, worse)), SETTINGS
    )
    by_case = evaluated.by_case.set_index(["series", "class"])
    assert by_case.loc[("a_t1", "vertebrae"), "dice"] == 1
    # 12 of 24 voxels found in each of 2 slices: 2 * 12 / (24 + 12)
    assert by_case.loc[("b_t1", "vertebrae"), "dice"] == pytest.approx(2 / 3)
    assert by_case.loc[("b_t1", "vertebrae"), "volume_error_ml"] == pytest.approx(-12 * 4.0 * 0.5 * 0.8 / 1000)
    by_class = evaluated.by_class.set_index(["scope", "class"])
    assert by_class.loc[("case mean", "vertebrae"), "dice"] == pytest.approx(5 / 6)
    assert by_class.loc[("pooled", "vertebrae"), "dice"] == pytest.approx(2 * 36 / (48 + 36))
    assert evaluated.confusion[1].tolist() == [12, 36, 0, 0]
    assert len(evaluated.by_slice) == 2 * 2 * 4
    intervals = evaluated.intervals.set_index(["scope", "class", "metric"])
    # Whoever is drawn, the mean lies between the two patients' figures, and both are reached.
    row = intervals.loc[("case mean", "vertebrae", "dice")]
    assert (row["value"], row["low"], row["high"]) == pytest.approx((5 / 6, 2 / 3, 1))
    assert (row["n_patients"], row["n_cases"]) == (2, 2)
    assert intervals.loc[("pooled", "mean foreground", "dice"), "value"] == pytest.approx((6 / 7 + 2) / 3)
    assert np.isnan(intervals.loc[("case mean", "vertebrae", "soft_dice"), "value"]), "no probabilities were given"


def test_intervals_say_of_how_many_cases_they_are():
    reference, worse = blocks()
    without = np.where(reference == 3, 0, reference)
    evaluated = evaluate_cases(
        to_read(case("a_t1", "a", without, without), case("b_t1", "b", without, np.where(worse == 3, 0, worse))),
        SETTINGS,
    )
    rows = evaluated.intervals[evaluated.intervals["metric"] == "dice"].set_index(["class", "scope"])
    for scope in ("pooled", "case mean"):
        assert rows.loc[("vertebrae", scope), ["n_cases", "n_undefined"]].tolist() == [2, 0]
        assert rows.loc[("IVD", scope), ["n_cases", "n_undefined"]].tolist() == [0, 2], "no case has any"


def test_references_that_are_not_the_model_inputs_are_an_error(series, tmp_path):
    data, predictions, update, _, _ = predict(series, tmp_path)
    keys = {name: series.record(name)["key"] for name in series.series()}
    data.manifest["ingested"] = keys
    update()
    assert list(predicted_cases(data.manifest, series, predictions)) == ["1_t1", "2_t1"]
    data.manifest["ingested"] = keys | {"2_t1": "of other labels"}
    for act in (update, lambda: predicted_cases(data.manifest, series, predictions)):
        with pytest.raises(ValueError, match="2_t1: the model input was made from another scan of this name"):
            act()


def test_the_ceiling_is_a_scope_of_its_own():
    reference, _ = blocks()
    ceiling = np.diag([100, 40, 16, 8])
    ceiling[1, 0] = 8
    evaluated = evaluate_cases(to_read(case("a_t1", "a", reference, reference)), SETTINGS, ceiling)
    row = evaluated.by_class.set_index(["scope", "class"]).loc[("ceiling", "vertebrae")]
    assert row["dice"] == pytest.approx(80 / 88)


def test_a_misspelt_setting_is_an_error():
    reference, _ = blocks()
    with pytest.raises(ValueError, match="unknown setting evaluation.batch"):
        evaluate_cases(to_read(case("a_t1", "a", reference, reference)), SETTINGS | {"batch": 1})
    with pytest.raises(ValueError, match="unknown setting evaluation.intervals.sample"):
        options = {"intervals": {"sample": 3, "seed": 0}}
        evaluate_cases(to_read(case("a_t1", "a", reference, reference)), SETTINGS | options)


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_side_by_side_predictions_and_figures_are_the_same_to_the_byte(
    series, tmp_path, monkeypatch, make_graph, backend
):
    monkeypatch.setattr(parallel, "SECONDS_WORTH_PROCESSES", 0.0)
    data, graph, found = model_input(series), make_graph((64, 64)), []
    for workers in (Workers(workers=1), Workers(backend, 2)):
        predictions = SeriesStore(tmp_path / workers.backend / str(workers.workers))
        work = prediction_work(partial(OnnxNetwork, graph), "weights", "network", data, series, SETTINGS)
        assert predictions.update(work, workers=workers).made == ["1_t1", "2_t1"]
        evaluated = evaluate_cases(predicted_cases(data.manifest, series, predictions), SETTINGS, workers=workers)
        files = [path for path in sorted(predictions.root.rglob("*")) if path.is_file()]
        found.append(([path.read_bytes() for path in files], evaluated))
    (files, one_by_one), (files_side_by_side, side_by_side) = found
    assert files_side_by_side == files and len(files) == 2 * 5
    for name in ("by_slice", "by_case", "by_class", "intervals"):
        pd.testing.assert_frame_equal(getattr(side_by_side, name), getattr(one_by_one, name), check_exact=True)
    assert side_by_side.confusion.tolist() == one_by_one.confusion.tolist()
    assert side_by_side.reliability.tolist() == one_by_one.reliability.tolist()


def test_a_net_that_onnx_lacks_is_computed_in_this_process(series, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(parallel, "SECONDS_WORTH_PROCESSES", 0.0)
    caplog.set_level("INFO", logger="lumbarflow")
    net, predictions = GreyIsClass(), SeriesStore(tmp_path / "predictions")
    work = prediction_work(lambda: net, "weights", "network", model_input(series), series, SETTINGS)
    assert predictions.update(work, "predict", workers=Workers("loky", 2)).made == ["1_t1", "2_t1"]
    assert caplog.messages[0].startswith(
        "predict: in this process alone, others cannot be sent it (PicklingError: ONNX"
    )
    assert net.slices


def test_a_case_that_cannot_be_scored_is_named():
    reference, _ = blocks()
    cases = to_read(case("a_t1", "a", reference, reference), case("b_t1", "b", reference, reference[:1]))
    with pytest.raises(parallel.WorkFailed, match=r"^score: 1 of 2 cases failed \(b_t1: ValueError: "):
        evaluate_cases(cases, SETTINGS)
