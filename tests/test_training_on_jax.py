"""The training core without TensorFlow, and the same net on both backends."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lumbarflow.losses import FocalDiceLoss
from lumbarflow.model_input import FORMAT_VERSION
from lumbarflow.networks import load_model

pytest.importorskip("jax")

# None in sys.modules makes every import of the name fail: a machine that has none of these, at which somebody watches.
CODE = """
import json, sys
for name in ("tensorflow", "kedro", "mlflow", "SimpleITK", "pandas", "tqdm", "yaml", "joblib", "onnx", "onnxruntime"):
    sys.modules[name] = None
sys.stderr.isatty = lambda: True
import numpy as np
from lumbarflow import training
from lumbarflow.networks import load_model
from lumbarflow.losses import FocalDiceLoss

code = training.main(sys.argv[1:7])
assert code == 0, code
model = load_model(sys.argv[4] + "/best.keras")
archive = np.load(sys.argv[7])
predicted = np.asarray(model.predict(archive["images"], verbose=0))
losses = [float(FocalDiceLoss(**one)(archive["labels"], predicted)) for one in json.loads(sys.argv[8])]
np.savez(sys.argv[9], predicted=predicted, losses=losses)
"""
LOSSES = [{}, {"dice_over": "classes", "missed_weight": 0.7, "boundary_weight": 0.5, "gamma": 2.5}]


def test_it_trains_without_tensorflow_and_predicts_the_same(tmp_path):
    rng = np.random.default_rng(0)
    sides: dict[str, dict[str, list[int]]] = {"train": {}, "validation": {}, "test": {}}
    for name, side in (("1", "train"), ("2", "validation")):
        folder = tmp_path / "in" / "series" / name
        folder.mkdir(parents=True)
        labels = np.repeat(rng.integers(0, 4, (3, 16, 6)), 4, axis=2).astype(np.uint8)
        np.save(folder / "labels.npy", labels)
        np.save(folder / "images.npy", (labels + rng.normal(scale=0.2, size=labels.shape)).astype(np.float16))
        sides[side][name] = [0, 1, 2]
    manifest = {"format_version": FORMAT_VERSION, "size": [16, 24], "sides": sides, "content_hash": "abc"}
    manifest |= {"classes": {str(k): str(k) for k in range(4)}, "series": {k: {"n_slices": 3} for k in "12"}}
    (tmp_path / "in" / "manifest.json").write_text(json.dumps(manifest))
    net = {"encoder_widths": [4, 6, 8], "encoder_dropouts": [0.1] * 3, "decoder_widths": [6], "decoder_dropouts": [0.1]}
    chosen = {"model": net | {"batch_norm_momentum": 0.5}, "training": {"epochs": 2, "batch_size": 2, "workers": 2}}
    (tmp_path / "settings.json").write_text(json.dumps(chosen))
    images = rng.normal(size=(2, 16, 24, 1)).astype(np.float32)
    np.savez(tmp_path / "given.npz", images=images, labels=labels[:2])

    arguments = [
        "--model-input",
        tmp_path / "in",
        "--output",
        tmp_path / "out",
        "--settings",
        tmp_path / "settings.json",
    ]
    arguments += [tmp_path / "given.npz", json.dumps(LOSSES), tmp_path / "told.npz"]
    # Compiling is most of the time here.
    environment = os.environ | {"KERAS_BACKEND": "jax", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "training_record.json").read_text())["hardware"]["backend"].startswith("jax")

    with np.load(tmp_path / "told.npz") as told:
        here = load_model(tmp_path / "out" / "best.keras").predict(images, verbose=0)
        np.testing.assert_allclose(here, told["predicted"], atol=1e-4)
        losses = [float(FocalDiceLoss(**one)(labels[:2], here)) for one in LOSSES]
        np.testing.assert_allclose(losses, told["losses"], atol=1e-4)
