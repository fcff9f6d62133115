"""The models, by name.

A new one is a module of this package with a function like `plain_unet` under the decorator `register`. All modules of
the package are imported with it, so nothing else names the model but the parameters. They must not import Keras.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from lumbarflow.backend import load_keras

if TYPE_CHECKING:
    import keras
    import numpy as np

    Batches = Iterable[tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model of the registry.

    Attributes:
        name: in parameters.
        title: in tables and figures.
        build: (size, channels, classes, *, precision, **settings) -> an uncompiled Keras model, (n, H, W, channels) ->
            probabilities float32 (n, H, W, classes). A model may have several outputs, as a list: the first is the
            above and what is served; the others, coarser by whole strides, are for the loss alone.
        adapt: None for a net that is trained by gradient. For any other model: adapt(model, batches) sets its weights.
            `batches` can be read repeatedly and holds the training slices, unaugmented: images float32 (n, H, W, 1)
            and labels uint8 (n, H, W).
        register_layers: None, or a function that registers the model's own layers with Keras, without which its file
            can't be read. It may be called repeatedly.
    """

    name: str
    title: str
    build: Callable[..., keras.Model]
    adapt: Callable[[keras.Model, Batches], None] | None = None
    register_layers: Callable[[], object] | None = None


MODELS: dict[str, Entry] = {}


def register(
    name: str,
    *,
    title: str,
    adapt: Callable[[keras.Model, Batches], None] | None = None,
    register_layers: Callable[[], object] | None = None,
):
    """Decorator: enter the function that builds a model into MODELS. Arguments as Entry's attributes.

    Raises ValueError if there is a model of that name.
    """

    def enter(build):
        if name in MODELS:
            raise ValueError(
                f"{build.__module__} registers a model {name!r}, which {MODELS[name].build.__module__} has already; "
                "expected a new name. Rename one of the two."
            )
        MODELS[name] = Entry(name, title, build, adapt, register_layers)
        return build

    return enter


def build(name: str, size: Sequence[int], channels: int, classes: int, **settings) -> keras.Model:
    """A model of the registry, untrained and uncompiled: (n, H, W, channels) -> probabilities (n, H, W, classes).

    Args:
        name: one of MODELS.
        size: (H, W) of its input.
        settings: the keyword arguments of that model's function.
    Raises:
        ValueError: no model of that name, or the model refuses its settings.
    """
    return find(name).build(size, channels, classes, **settings)


def find(name: str) -> Entry:
    """The registry's entry `name`. Raises ValueError if there is none."""
    if name not in MODELS:
        raise ValueError(f"model.name is {name!r}; expected one of {sorted(MODELS)}.")
    return MODELS[name]


def serving_model(model: keras.Model) -> keras.Model:
    """The model from its input to its first output alone, without the heads that only the loss needs.

    It shares layers, and so weights, with `model`, goes by the same name and is saved and loaded like one that was
    built without further heads. A model with one output is returned as it is.
    """
    if len(model.outputs) == 1:
        return model
    return load_keras().Model(model.input, model.outputs[0], name=model.name)


def register_layers() -> None:
    """Let Keras read the files of all models, those with layers of their own too."""
    for entry in MODELS.values():
        if entry.register_layers is not None:
            entry.register_layers()


# Last, since they import `register` from here.
for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
