"""The one door to Keras and to what computes under it: a quiet import, the hardware, the precision, the seeds.

TensorFlow's C++ libraries write to the process's standard error before any logging setting reaches them (absl's
"All log messages before absl::InitializeLog()", CPU features, missing CUDA drivers, XLA's service at the first
compilation). So the import and the first use of the runtime happen with file descriptor 2 pointing at a temporary
file. What was caught goes to this module's log at DEBUG level, or back to standard error if the import fails.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import IO

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "float32", "mixed_bfloat16")
# Under either of these mixed_bfloat16 was measured to be faster than float32 (1.5 times with AVX512-BF16 alone, 1.9
# times with AMX); without them bfloat16 is emulated, and slower.
BFLOAT16_CPU_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})
# bfloat16 came to NVIDIA's tensor cores with compute capability 8.0 (Ampere).
BFLOAT16_GPU_CAPABILITY = (8, 0)
CPU_INFORMATION = Path("/proc/cpuinfo")

# Streams to the terminal that outlive `quiet_stderr`, held so that they are not closed as garbage.
_left_open: list[IO[str]] = []


@cache
def load_keras() -> ModuleType:
    """Keras, on the backend that KERAS_BACKEND names, TensorFlow if it names none; nothing reaches the terminal.

    GPUs that TensorFlow sees take memory as they need it, rather than all of it at once.

    Raises:
        ImportError: Keras or its backend is not installed or does not load.
    """
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    # Holds back most of the chatter even in processes of ours that start outside this function's reach.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # oneDNN's convolutions, which TensorFlow switches on by itself only on CPUs with AVX512-VNNI or newer: see
    # benchmarks/training.py --options for what they gain with AVX2 alone.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    with quiet_stderr("Keras's start-up"):
        keras = importlib.import_module("keras")
        if keras.config.backend() == "tensorflow":
            _let_gpu_memory_grow()
        # The first convolution starts the runtime, and on a GPU loads cuDNN, which says so.
        keras.ops.conv(keras.ops.ones((1, 4, 4, 1)), keras.ops.ones((3, 3, 1, 1)))
    return keras


@contextlib.contextmanager
def quiet_stderr(description: str) -> Iterator[None]:
    """Keep what native code writes to standard error off the terminal: to the log, or back if the block raises.

    Python's own sys.stderr goes on writing to the terminal. Blocks must not be nested or run in two threads.
    """
    try:
        terminal = os.dup(2)
    except OSError:  # No standard error at all, as in a detached process: there is nothing to keep quiet.
        yield
        return
    python_stderr = sys.stderr
    # Stays open for good: whoever sets up logging inside the block (TensorFlow does) keeps writing to it afterwards.
    unredirected = open(terminal, "w", buffering=1, errors="replace")  # noqa: SIM115
    _left_open.append(unredirected)
    with tempfile.TemporaryFile() as caught:
        with contextlib.suppress(Exception):
            python_stderr.flush()
        # Only a sys.stderr that writes to descriptor 2 has to be moved; test runners and notebooks have others.
        moved = _descriptor(python_stderr) == 2
        os.dup2(caught.fileno(), 2)
        if moved:
            sys.stderr = unredirected
        try:
            yield
        except BaseException:
            os.dup2(terminal, 2)
            os.write(2, _read(caught))
            raise
        finally:
            os.dup2(terminal, 2)
            if moved:
                sys.stderr = python_stderr
        for line in _read(caught).decode(errors="replace").splitlines():
            logger.debug("%s: %s", description, line)


def resolve_precision(precision: str) -> str:
    """The Keras dtype policy for a `precision` setting.

    Args:
        precision: "float32", "mixed_bfloat16", or "auto": mixed_bfloat16 where the GPU, or without one the CPU,
            computes faster in it, else float32.
    Raises:
        ValueError: another name.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"training.precision is {precision!r}; expected one of {list(PRECISIONS)}.")
    if precision != "auto":
        return precision
    gpus = _gpu_details()
    if gpus:
        capable = all(gpu.get("compute_capability", (0, 0)) >= BFLOAT16_GPU_CAPABILITY for gpu in gpus)
    elif load_keras().config.backend() != "tensorflow":
        # On CPUs measured with TensorFlow only; other backends get the precision that is right everywhere.
        capable = False
    else:
        capable = not BFLOAT16_CPU_FLAGS.isdisjoint(_cpu_information("flags"))
    return "mixed_bfloat16" if capable else "float32"


def describe_hardware(precision: str = "auto") -> dict:
    """What computes, for the log and the run's record.

    Returns:
        keras, backend: names with versions; processor: its name; cores: those this process may use; gpus: their
        names; precision: the dtype policy that `precision` resolves to.
    """
    keras = load_keras()
    backend = keras.config.backend()
    return {
        "keras": keras.__version__,
        "backend": f"{backend} {importlib.import_module(backend).__version__}",
        "processor": " ".join(_cpu_information("model name")) or platform.processor() or platform.machine(),
        "cores": core_count(),
        "gpus": [gpu.get("device_name", "unnamed GPU") for gpu in _gpu_details()],
        "precision": resolve_precision(precision),
    }


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and the backend's random numbers: initial weights and dropout follow from it."""
    load_keras().utils.set_random_seed(seed)


def sum_over_replicas(x):
    """Arrays summed over all devices that share a step; the arrays as they are where there is one, or no step runs.

    On TensorFlow the devices are the replicas of a tf.distribute strategy, each of which sees its part of the batch.
    On JAX an array spread over devices is one array to the code, whose sums run over all of it already. The gradient
    passes: that of a replica's x is the sum of the replicas' gradients.

    Args:
        x: an array or a list of them, reduced together. Every replica has to get here, with the same shapes.
    """
    if load_keras().config.backend() != "tensorflow":
        return x
    context = importlib.import_module("tensorflow").distribute.get_replica_context()
    # None while a strategy speaks for all replicas at once, as when Keras infers shapes.
    if context is None or context.num_replicas_in_sync == 1:
        return x
    return context.all_reduce("SUM", x)


def _let_gpu_memory_grow() -> None:
    tensorflow = importlib.import_module("tensorflow")
    for gpu in tensorflow.config.list_physical_devices("GPU"):
        try:
            tensorflow.config.experimental.set_memory_growth(gpu, True)
        except RuntimeError as error:  # Someone used TensorFlow before us; it runs, with memory taken all at once.
            logger.debug("memory growth of %s stays as it was: %s", gpu.name, error)


def _gpu_details() -> list[dict]:
    keras = load_keras()
    if keras.config.backend() == "tensorflow":
        config = importlib.import_module("tensorflow").config
        return [config.experimental.get_device_details(gpu) for gpu in config.list_physical_devices("GPU")]
    if keras.config.backend() != "jax":
        return []
    # Not Keras's list of devices, which is an error where there is no GPU.
    devices = importlib.import_module("jax").local_devices()
    return [
        {"device_name": gpu.device_kind, "compute_capability": _capability(gpu)}
        for gpu in devices
        if gpu.platform == "gpu"
    ]


def _capability(gpu) -> tuple[int, ...]:
    """(8, 0) of "8.0"; (0, 0) for a GPU that has no such number."""
    try:
        return tuple(int(part) for part in str(gpu.compute_capability).split("."))
    except (AttributeError, ValueError):
        return (0, 0)


def _cpu_information(key: str) -> list[str]:
    """The words after `key` in /proc/cpuinfo; none where there is no such file (macOS, Windows) or line."""
    try:
        lines = CPU_INFORMATION.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    fields = (line.partition(":") for line in lines)
    return next((words.split() for name, _, words in fields if name.strip() == key), [])


def _descriptor(stream) -> int | None:
    try:
        return stream.fileno()
    except Exception:  # Replaced streams fail in many ways: no such attribute, closed, unsupported.
        return None


def _read(file) -> bytes:
    file.seek(0)
    return file.read()
