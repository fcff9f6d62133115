"""Training over several devices, each with its part of every batch; one place for what TensorFlow and JAX name apart.

On TensorFlow that is `tf.distribute.MirroredStrategy` (Keras's DataParallel does nothing there), on JAX
`keras.distribution.DataParallel`. Losses are of the whole batch on either (`backend.sum_over_replicas`), and batch
normalisation takes its figures from the whole batch too.
"""

from __future__ import annotations

import contextlib
import importlib
from contextlib import AbstractContextManager, nullcontext
from functools import cache

from lumbarflow.backend import load_keras


@cache
def _mirrored_strategy(names: tuple[str, ...]):
    """One for each set of devices and process: a second one would meet the first one's collective operations."""
    return importlib.import_module("tensorflow").distribute.MirroredStrategy(names)


class Devices:
    """The devices that share each batch.

    Args:
        wanted: how many, or "all" that there are: GPUs, or CPUs where there is none.
        batch_size: slices per step over all of them.
    Attributes:
        names: of the devices, as the backend calls them.
    Raises:
        ValueError: there are fewer, the batch cannot be shared evenly, or the backend is another one.
    """

    def __init__(self, wanted: int | str, batch_size: int):
        self._keras = load_keras()
        self._backend = self._keras.config.backend()
        self.names = self._find(wanted)
        if batch_size % len(self.names):
            raise ValueError(
                f"training.batch_size is {batch_size} on {len(self.names)} devices; expected a multiple of "
                f"{len(self.names)}, so that each has as many slices. Change training.batch_size or training.devices."
            )
        self._strategy = self._distribution = None
        if len(self.names) == 1:
            return
        if self._backend == "tensorflow":
            self._strategy = _mirrored_strategy(tuple(self.names))
        else:
            self._distribution = self._keras.distribution.DataParallel(devices=self.names, auto_shard_dataset=False)

    def building(self) -> AbstractContextManager:
        """Within it the net and its optimiser come into being on all devices."""
        if self._strategy is not None:
            return self._strategy.scope()
        return self.running()

    def running(self) -> AbstractContextManager:
        """Within it the net is trained. (TensorFlow's nets remember where they were built.)"""
        return self._distribution.scope() if self._distribution is not None else nullcontext()

    @contextlib.contextmanager
    def apart(self):
        """Within it, inside `running`, another net works on one device."""
        if self._distribution is None:
            yield
            return
        distribution = self._keras.distribution
        distribution.set_distribution(None)
        try:
            yield
        finally:
            distribution.set_distribution(self._distribution)

    def _find(self, wanted: int | str) -> list[str]:
        if wanted == 1:
            return ["the default device"]
        kinds = [(kind, self._list(kind)) for kind in ("gpu", "cpu")]
        kind, there = next((kind, names) for kind, names in kinds if names)
        count = len(there) if wanted == "all" else int(wanted)
        if count > len(there):
            raise ValueError(
                f"training.devices is {count}; expected at most {len(there)}, the {kind.upper()}s that "
                f"{self._backend} sees here."
            )
        return there[:count]

    def _list(self, kind: str) -> list[str]:
        if self._backend == "tensorflow":
            config = importlib.import_module("tensorflow").config
            return [device.name.removeprefix("/device:") for device in config.list_logical_devices(kind.upper())]
        if self._backend == "jax":
            # Not Keras's list, which is an error where there is no GPU.
            devices = importlib.import_module("jax").devices()
            return [f"{kind}:{device.id}" for device in devices if device.platform == kind]
        raise ValueError(f"training.devices is above 1 on the backend {self._backend}; expected tensorflow or jax.")
