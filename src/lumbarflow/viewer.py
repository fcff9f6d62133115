"""A case as one HTML page: its volume to scroll through, reference and prediction on it, and their figures below.

The page shows volumes with NiiVue (BSD 2-Clause, https://github.com/niivue/niivue). pip installs it within ipyniivue,
whose `save_html` puts the same library into pages; the page carries it, the volumes and all else, and loads nothing:
it opens from a disk without a network or a server.

What people see and do there is in `viewer.html`, beside this file.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import tempfile
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib import metadata, resources
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import pandas as pd

from lumbarflow.imaging import LabelMap, Volume, write_volume
from lumbarflow.instances import label_instances
from lumbarflow.labels import CLASS_COUNT, CLASSES, FOREGROUND, MISSED, PALETTE
from lumbarflow.measurements import measure, measurement_table
from lumbarflow.report import MISSING, MISSING_NOTE, NOT_A_DEVICE, cell_text, heading

# Of a split by slice.
_TESTED_IN_PART = (
    "Not all slices shown were tested: the figures are of those that were, and the net may have learnt from the others."
)
# What the page calls of NiiVue.
_NEEDED = ("Niivue", "NVImage", "SLICE_TYPE")
# A string as encodeURIComponent makes it; the library is over two million characters, nothing else comes near it.
_ENCODED = re.compile(r"[\w\-.!~*'()%]{200000,}", re.ASCII)
_EXPORTS = re.compile(r"export\s*\{([^{}]*)\}\s*;?\s*$")
# NiiVue draws these as they are. Other types are shown as float32, which no grey value of MRI suffers from.
_DRAWN = tuple(map(np.dtype, ("uint8", "int16", "uint16", "float32")))
_MODEL = re.compile(r'<meta name="lumbarflow-model" content="([^"]*)">')
_MODEL_WITHIN = 2000  # characters of the head


class Niivue(NamedTuple):
    """The library as a page needs it: gzip in base64, the version of ipyniivue that it came with, its licence."""

    packed: str
    source: str
    licence: str


@cache
def niivue() -> Niivue:
    """NiiVue as the installed ipyniivue holds it, complete and unchanged.

    Raises:
        RuntimeError: no ipyniivue, or one without the library.
    """
    try:
        package = metadata.distribution("ipyniivue")
    except metadata.PackageNotFoundError:
        raise RuntimeError(
            "ipyniivue: not installed; expected the package that brings the viewer NiiVue. Run: pip install ipyniivue"
        ) from None
    path = Path(package.locate_file("ipyniivue/static/widget.js"))
    code = _library(path.read_text(encoding="utf-8") if path.is_file() else "")
    licence = package.read_text("licenses/LICENSE") or package.read_text("LICENSE")
    if code is None or licence is None:
        raise RuntimeError(
            f"{path}: no NiiVue library with its licence in ipyniivue {package.version}; expected a module that "
            f"exports {', '.join(_NEEDED)}, as ipyniivue 2.4 holds. Run: pip install 'ipyniivue>=2.4.2,<2.5'"
        )
    return Niivue(_packed(code.encode()), f"ipyniivue {package.version}", licence.strip())


def _library(widget: str) -> str | None:
    """The ES module in ipyniivue's script that its `save_html` writes into pages; None if it isn't there."""
    for found in _ENCODED.finditer(widget):
        code = unquote(found[0])
        exports = _EXPORTS.search(code)
        if exports and set(_NEEDED) <= {name.split(" as ")[-1].strip() for name in exports[1].split(",")}:
            return code
    return None


def _packed(data: bytes) -> str:
    # Without a time, so that equal cases are equal pages.
    return base64.b64encode(gzip.compress(data, compresslevel=6, mtime=0)).decode()


def chosen_cases(asked: Any, cases: Sequence[str], shown: Sequence[str]) -> list[str]:
    """The cases whose pages to write.

    Args:
        asked: the name of one, "all", or "shown".
        cases: the names of all there are.
        shown: those that the report shows.
    Raises:
        ValueError: no such case; lists those there are.
    """
    # A name that is a number comes as one from the command line.
    found = {"all": list(cases), "shown": list(dict.fromkeys(shown))}.get(str(asked), [str(asked)])
    if unknown := [name for name in found if name not in cases]:
        raise ValueError(
            f"viewer.case: no test case {unknown[0]!r}; expected 'shown', 'all' or one of {', '.join(sorted(cases))}. "
            "Name one with --params=case=NAME."
        )
    return found


def embedded_volume(volume: Volume) -> str:
    """A volume as a .nii.gz file in base64, with its geometry."""
    if volume.array.dtype not in _DRAWN:
        volume = volume.with_array(volume.array.astype(np.float32))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "volume.nii"
        write_volume(volume, path)
        return _packed(path.read_bytes())


def outlined(classes: np.ndarray) -> np.ndarray:
    """Classes, by which pixels lie at the rim of their structure: there, CLASS_COUNT - 1 is added to the class.

    A page then fills a structure or draws its outline by colours alone.

    Args:
        classes: uint8 (slice, row, column).
    Returns:
        uint8, same shape: 1..3 inside, 4..6 where a neighbour above, below, before or behind is of another class.
    """
    padded = np.pad(classes, ((0, 0), (1, 1), (1, 1)))
    neighbours = (padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:])
    rim = np.any([neighbour != classes for neighbour in neighbours], axis=0) & (classes > 0)
    return (classes + rim * (CLASS_COUNT - 1)).astype(np.uint8)


def differences(reference: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """uint8 classes of both -> uint8: CLASS_COUNT * reference + prediction where they differ, else 0."""
    return np.where(reference != prediction, CLASS_COUNT * reference + prediction, 0).astype(np.uint8)


def level_table(reference: LabelMap, prediction: LabelMap) -> pd.DataFrame:
    """The measurements of both, side by side, of the structures that either has.

    Levels are counted from the lowest structure up, in each by itself: where one lacks its lowest, they are shifted.

    Args:
        reference, prediction: sagittal, classes.
    Returns:
        structure, number, quantity, unit, reference, prediction, notes (see `measurements.measurement_table`); NaN
        where there is no value.
    """
    index = ["structure", "number", "quantity"]
    sides = {"reference": _measured(reference), "prediction": _measured(prediction)}
    # The order of the measurements, which a merge would lose.
    table = pd.concat(sides.values())[[*index, "unit"]].drop_duplicates()
    for side, measured in sides.items():
        own = measured.rename(columns={"value": side, "note": f"note_{side}"}).drop(columns="unit")
        table = table.merge(own, on=index, how="left")
    notes = [
        "; ".join(f"{side}: {note}" for side, note in zip(sides, pair, strict=True) if note)
        for pair in table[[f"note_{side}" for side in sides]].fillna("").itertuples(index=False)
    ]
    return table.assign(notes=notes)[[*index, "unit", *sides, "notes"]]


def _measured(classes: LabelMap) -> pd.DataFrame:
    column, row, between = classes.spacing_mm
    instances = label_instances(classes.array, (between, row, column))
    return measurement_table(measure(classes.with_array(instances)))


def case_page(
    name: str, image: Volume, reference: LabelMap, prediction: LabelMap, figures: pd.DataFrame, model: str
) -> str:
    """The page of one case; all text is escaped, and the browser is told to load nothing.

    Args:
        name: of the series; nothing else in the page tells whose scan it is.
        image: sagittal.
        reference, prediction: uint8 classes on its grid.
        figures: the case's rows of `metrics.table_by_case`.
        model: digest of the weights that predicted, see `model_of`.
    Raises:
        ValueError: grids of different sizes.
    """
    if not image.size == reference.size == prediction.size:
        raise ValueError(
            f"{name}: an image of {image.size} voxels, a reference of {reference.size} and a prediction of "
            f"{prediction.size}; expected one grid for all three. Run ingest and evaluate again."
        )
    library = niivue()
    masks = (outlined(reference.array), outlined(prediction.array), differences(reference.array, prediction.array))
    colours = {"classes": [PALETTE[CLASSES[index]] for index in FOREGROUND], "missed": MISSED}
    low, high = (float(value) for value in np.percentile(image.array, (1, 99)))
    case = {
        "classes": [CLASSES[index] for index in FOREGROUND],
        "colours": colours,
        "window": [low, max(high, low + 1e-6)],
    }
    values = {
        "name": escape(name),
        "model": escape(model),
        "notice": escape(NOT_A_DEVICE),
        "tested": "" if figures["whole"].all() else f"<p>{_TESTED_IN_PART}</p>",
        "palette": "".join(f"--{CLASSES[index]}: {PALETTE[CLASSES[index]]}; " for index in FOREGROUND)
        + f"--missed: {MISSED};",
        "layers": "".join(_switches(*layer) for layer in _LAYERS),
        "figures": _figures_html(figures),
        "levels": _levels_html(level_table(reference, prediction)),
        "licence": escape(library.licence),
        "source": escape(library.source),
        # In JSON, "<" may only stand in strings, where it can be written so that no tag ends the script.
        "case": json.dumps(case, ensure_ascii=False).replace("<", r"\u003c"),
        "library": library.packed,
        "image": embedded_volume(image),
    }
    for (layer, *_), mask in zip(_LAYERS, masks, strict=True):
        values[layer] = embedded_volume(reference.with_array(mask))
    template = resources.files("lumbarflow").joinpath("viewer.html").read_text(encoding="utf-8")
    # In one pass: what is filled in is not looked at for places to fill.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: values[place[1]], template)


def model_of(page: str) -> str | None:
    """The digest of the weights whose prediction a page shows; None if it isn't a page of `case_page`."""
    found = _MODEL.search(page[:_MODEL_WITHIN])
    return found[1] if found else None


# Layer, heading, key, whether it is shown at first, and how it is drawn.
_LAYERS = (
    ("reference", "Reference", "r", True, "filled"),
    ("prediction", "Prediction", "p", True, "outline"),
    ("differences", "Differences", "d", False, ""),
)


def _switches(layer: str, title: str, key: str, shown: bool, style: str) -> str:
    """The controls of one layer: on or off, filled or outline, and a switch for each class."""
    pressed = str(shown).lower()
    outline = (
        f'<button type="button" class="style" data-layer="{layer}" aria-pressed="{str(style == "outline").lower()}" '
        f'aria-label="{title}: outlines only">outline</button>'
        if style
        else ""
    )
    classes = "".join(
        f'<button type="button" class="class" data-layer="{layer}" data-class="{index}" aria-pressed="true" '
        f'style="--colour: var(--{CLASSES[index]})" aria-label="{title}: {CLASSES[index]}">{CLASSES[index]}</button>'
        for index in FOREGROUND
    )
    missed = "" if style else '<p class="hint">as predicted, or <span class="missed"></span>in the reference only</p>'
    return (
        f'<fieldset class="layer"><legend>{title}</legend>\n<div class="head">'
        f'<button type="button" class="show" data-layer="{layer}" aria-pressed="{pressed}" aria-keyshortcuts="{key}" '
        f'aria-label="Show {title.lower()}"><span>{title}</span><kbd>{key}</kbd></button>{outline}</div>\n'
        f'<div class="classes">{classes}</div>{missed}\n</fieldset>\n'
    )


# --- tables ----------------------------------------------------------------------------------------------------------


def _figures_html(figures: pd.DataFrame) -> str:
    """One row per figure, one column per foreground class."""
    names = [CLASSES[index] for index in FOREGROUND]
    by_class = figures.drop(columns=["series", "patient", "whole"], errors="ignore").set_index("class").reindex(names)
    rows = [[heading(figure), *(_cell(figure, value) for value in by_class[figure])] for figure in by_class]
    head = "".join(
        f'<th scope="col" class="number"><span class="swatch" style="--colour: var(--{name})"></span>{name}</th>'
        for name in names
    )
    return _table("Figures of this case", f'<tr><th scope="col">figure</th>{head}</tr>', rows)


def _cell(figure: str, value: Any) -> str:
    # Counts turn into floats beside an undefined one; they still are no fractions.
    counts = figure.endswith(("_components", "_specks")) and pd.notna(value)
    return cell_text(value, ",.0f") if counts else cell_text(value) or "none"


def _levels_html(levels: pd.DataFrame) -> str:
    """A table of vertebrae and one of discs, one row per level from the lowest up; then the angle, then the notes."""
    parts = []
    for structure, plural in (("vertebra", "Vertebrae"), ("disc", "Discs")):
        own = levels[levels["structure"] == structure]
        if own.empty:
            continue
        quantities = list(dict.fromkeys(own["quantity"]))
        values = own.set_index(["number", "quantity"])
        rows = [
            [f"{structure} {number}", *(_value(values, (number, name), side) for name in quantities for side in _SIDES)]
            for number in sorted(own["number"].unique())
        ]
        groups = "".join(f'<th scope="colgroup" colspan="2">{escape(_words(name))}</th>' for name in quantities)
        sides = "".join(f'<th scope="col" class="number">{side}</th>' for side in _SIDES) * len(quantities)
        head = f'<tr><th scope="col" rowspan="2">level</th>{groups}</tr>\n<tr>{sides}</tr>'
        parts.append(_table(f"{plural}, in mm, from the lowest up", head, rows))
    spine = levels[levels["structure"] == "spine"]
    rows = [
        [_words(row.quantity), *(cell_text(getattr(row, side), _TENTHS) for side in _SIDES)]
        for row in spine.itertuples()
    ]
    if rows:
        sides = "".join(f'<th scope="col" class="number">{side}</th>' for side in _SIDES)
        parts.append(_table("Spine, in degrees", f'<tr><th scope="col">angle</th>{sides}</tr>', rows))
    noted: dict[str, list[str]] = {}
    for row in levels[levels["notes"] != ""].itertuples():
        which = row.structure if pd.isna(row.number) else f"{row.structure} {row.number}"
        noted.setdefault(f"{which}: {row.notes}", []).append(_words(row.quantity))
    if noted:
        lines = "".join(f"<li>{escape(note)} ({escape(', '.join(names))})</li>\n" for note, names in noted.items())
        parts.append(
            f'<details class="notes"><summary>Notes to the measurements</summary>\n<ul>\n{lines}</ul></details>\n'
        )
    return "".join(parts)


_SIDES = ("reference", "prediction")
_TENTHS = "z,.1f"


def _words(quantity: str) -> str:
    return quantity.replace("canal_ap", "canal depth").replace("_", " ")


def _value(values: pd.DataFrame, where: tuple, side: str) -> str:
    return cell_text(values.at[where, side], _TENTHS) if where in values.index else MISSING


def _table(caption: str, head: str, rows: Sequence[Sequence[str]]) -> str:
    """`head` is HTML; the cells of `rows` are text, the first of each its heading."""
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
        + "</tr>\n"
        for first, *cells in rows
    )
    note = f'<p class="hint">{MISSING_NOTE}</p>\n' if any(MISSING in row for row in rows) else ""
    return (
        f'<figure>\n<figcaption>{escape(caption)}</figcaption>\n<div class="box" role="region" tabindex="0" '
        f'aria-label="{escape(caption)}">\n<table>\n<thead>\n{head}\n</thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n'
        f"{note}</figure>\n"
    )
