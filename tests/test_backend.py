from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lumbarflow import backend

SOURCE = Path(backend.__file__).parents[1]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    # Without TF_CPP_MIN_LOG_LEVEL from outside: a newcomer's shell has none.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TF_", "KERAS_"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": str(SOURCE), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_importing_building_and_training_write_nothing_to_the_terminal():
    code = """
from lumbarflow.backend import load_keras
keras = load_keras()
import numpy as np
model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(2, 3)])
model.compile("adam", "mse", jit_compile=True)
model.fit(np.zeros((2, 8, 8, 1)), np.zeros((2, 6, 6, 2)), verbose=0)
# All parts of our loss, of which the border's says something on a CPU without AVX-512 where it transposes truth values.
from lumbarflow.losses import FocalDiceLoss
model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3, padding="same", activation="softmax")])
model.compile("adam", FocalDiceLoss(dice_over="classes", missed_weight=0.6, boundary_weight=0.5), jit_compile=False)
model.fit(np.zeros((2, 8, 8, 1)), np.ones((2, 8, 8), np.uint8), verbose=0)
print(keras.config.backend())
"""
    finished = run_python(code)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "tensorflow\n", "")


def test_a_failed_import_gives_its_text_back(tmp_path):
    # A Keras whose native part says why it does not load.
    (tmp_path / "keras.py").write_text('import os; os.write(2, b"libreason\\n"); raise ImportError("broken")')
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom lumbarflow.backend import load_keras; load_keras()"
    finished = run_python(code)
    assert finished.returncode == 1
    assert finished.stderr.startswith("libreason\n")
    assert finished.stderr.endswith("ImportError: broken\n")


def test_what_native_code_writes_goes_to_the_log(capfd, caplog):
    with caplog.at_level(logging.DEBUG, "lumbarflow.backend"), backend.quiet_stderr("start"):
        os.write(2, b"chatter\n")
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "afterwards\n"
    assert caplog.messages == ["start: chatter"]


def test_what_native_code_writes_comes_back_if_the_block_fails(capfd):
    with pytest.raises(ImportError, match="no such backend"), backend.quiet_stderr("start"):
        os.write(2, b"the reason\n")
        raise ImportError("no such backend")
    assert capfd.readouterr().err == "the reason\n"


def test_pythons_own_standard_error_is_not_held_back():
    code = """
import os, sys
from lumbarflow.backend import quiet_stderr
with quiet_stderr("start"):
    print("a warning", file=sys.stderr)
    os.write(2, b"chatter")
print("afterwards", file=sys.stderr)
"""
    assert run_python(code).stderr == "a warning\nafterwards\n"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx512f avx512_bf16", "mixed_bfloat16"),
        ("fpu amx_tile amx_bf16", "mixed_bfloat16"),
        # Neither a flag's beginning nor AMX for integers will do.
        ("fpu avx512f amx_int8 avx512_bf16x", "float32"),
    ],
)
def test_automatic_precision_follows_the_processor(tmp_path, monkeypatch, flags, expected):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t: fpu\n")
    monkeypatch.setattr(backend, "CPU_INFORMATION", info)
    monkeypatch.setattr(backend, "_gpu_details", lambda: [])
    assert backend.resolve_precision("auto") == expected
    assert backend.describe_hardware()["processor"] == "Some CPU"


def test_automatic_precision_is_float32_where_the_processor_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "CPU_INFORMATION", tmp_path / "absent")
    monkeypatch.setattr(backend, "_gpu_details", lambda: [])
    assert backend.resolve_precision("auto") == "float32"
    assert backend.describe_hardware()["processor"]


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [([(9, 0)], "mixed_bfloat16"), ([(7, 5)], "float32"), ([(9, 0), (7, 5)], "float32")],
)
def test_automatic_precision_follows_the_weakest_gpu(monkeypatch, capabilities, expected):
    gpus = [{"device_name": "Some GPU", "compute_capability": capability} for capability in capabilities]
    monkeypatch.setattr(backend, "_gpu_details", lambda: gpus)
    assert backend.resolve_precision("auto") == expected
    assert backend.describe_hardware()["gpus"] == ["Some GPU"] * len(gpus)


def test_a_named_precision_is_taken_as_it_is():
    assert backend.resolve_precision("float32") == "float32"
    assert backend.resolve_precision("mixed_bfloat16") == "mixed_bfloat16"
    with pytest.raises(ValueError, match="training.precision is 'half'; expected one of .*mixed_bfloat16"):
        backend.resolve_precision("half")


def test_the_hardware_is_described():
    described = backend.describe_hardware("float32")
    assert described["backend"].startswith("tensorflow 2.")
    assert described["cores"] >= 1
    assert described["precision"] == "float32"


def test_a_seed_fixes_initial_weights():
    def weights(seed):
        backend.set_seed(seed)
        keras = backend.load_keras()
        return keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)]).get_weights()[0]

    first = weights(5)
    assert np.array_equal(first, weights(5))
    assert not np.array_equal(first, weights(6))


def test_on_one_device_nothing_is_summed_over_replicas():
    arrays = [np.ones(2), np.ones(3)]
    assert backend.sum_over_replicas(arrays) is arrays


def test_arrays_and_gradients_are_summed_over_replicas():
    # Replica 0 has 1 and [10, 20], replica 1 has 2 and [20, 40]. d(a ** 2)/da is 2 * 3 on each, and the gradients of
    # two equal results come back together.
    code = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from lumbarflow.backend import load_keras, sum_over_replicas
load_keras()
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

@tf.function
def replica():
    x = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float32) + 1
    with tf.GradientTape() as tape:
        tape.watch(x)
        a, b = sum_over_replicas([x, x * tf.constant([10.0, 20.0])])
        squared = a ** 2
    return a, b, tape.gradient(squared, x)

for values in strategy.run(replica):
    print([value.numpy().tolist() for value in strategy.experimental_local_results(values)])
with strategy.scope():
    print(sum_over_replicas(5))
"""
    finished = run_python(code)
    told = ["[3.0, 3.0]", "[[30.0, 60.0], [30.0, 60.0]]", "[12.0, 12.0]", "5"]
    assert finished.stdout.splitlines() == told, finished.stderr
