"""The one door to Keras and to what computes under it: a quiet import, hardware, precision and seeds.

TensorFlow's C++ libraries write to the process's standard error before any logging setting reaches them
(absl's "All log messages before absl::InitializeLog()", CPU features, missing CUDA drivers, XLA's service at the
first compilation), so the import and the first use of the runtime happen with file descriptor 2 pointing at a
temporary file. What was caught goes to this module's log at DEBUG level, and back to the terminal if the import fails.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

log = logging.getLogger(__name__)

PRECISIONS = ("auto", "float32", "mixed_bfloat16")
# The flags of /proc/cpuinfo under which mixed_bfloat16 was measured to be faster than float32.
BFLOAT16_CPU_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})
def load_keras():
    import os
    os.environ.setdefault("KERAS_BACKEND","tensorflow")
    import keras
    return keras
