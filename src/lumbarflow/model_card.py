"""What a registered version says of itself to people: a page of Markdown, from the record that lies beside the net.

It is shown as the version's description: it must fit there, and names nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Of `metrics_intervals`: heading, scope, metric, digits.
COLUMNS = (
    ("Dice, pooled", "pooled", "dice", 3),
    ("IoU, pooled", "pooled", "iou", 3),
    ("Dice, mean of cases", "case mean", "dice", 3),
    ("ASD in mm, mean of cases", "case mean", "asd_mm", 2),
    ("HD95 in mm, mean of cases", "case mean", "hd95_mm", 2),
)

LIMITS = """\
For research and teaching. It is no medical device: not for diagnosis, treatment or any other decision about a patient.

- Meant for MRI of adults' lumbar spines in roughly sagittal slices. Not for CT, radiographs, axial or coronal slices, \
or other regions; it gives labels there too, and they mean nothing.
- Beyond the sequences and pixel sizes above, and for other scanners, fractures, tumours, implants or marked \
deformity, nobody has measured it.
- It can be wrong without a sign of it. Look at the masks before you use them."""


def model_card(record: Mapping[str, Any], name: str, version: str | None = None, verdict: str | None = None) -> str:
    """The card of one version.

    Args:
        record: of `lumbarflow.registry.log_model`: settings, classes, origin, preparation, cohort, data,
            metrics_intervals.
        name: of the registered model.
        version, verdict: its number and what was decided about its promotion; None while it has none yet.
    Returns:
        Markdown.
    """
    origin, cohort = record["origin"], record["cohort"]
    classes = ", ".join(
        f"{index} {label}" for index, label in sorted(record["classes"].items(), key=lambda c: int(c[0]))
    )
    uri = f"models:/{name}/{version or 'VERSION'}"
    sections = [
        f"# {name}" + (f", version {version}" if version else ""),
        f"Segments lumbar spine MRI, sagittal slice by sagittal slice, into the classes {classes}. The net's "
        "preprocessing travels with it.",
        f'Load it: `mlflow.pyfunc.load_model("{uri}")`',
        *(["## Promotion", verdict] if verdict else []),
        "## Data and split",
        _data(origin, record["data"]),
        _table(
            ("side", "patients", "series", "slices"),
            [(side, *(counts[key] for key in ("patients", "series", "slices"))) for side, counts in _sides(cohort)],
        ),
        _scans(cohort),
        "## Figures on the test patients",
        *([LEAKY] if origin["leaky"] else []),
        _figures(record["metrics_intervals"]),
        "## Labels and preprocessing",
        _labels(record["preparation"]["labels"]),
        _preprocessing(record["settings"]),
        "## Intended use and limits",
        LIMITS,
        _size_of(origin, cohort),
        "## Origin and licence",
        _origin(origin),
    ]
    return "\n\n".join(sections) + "\n"


LEAKY = (
    "**Too good:** slices of the same patients stand on both sides of the split, so these figures say little of new "
    "patients."
)


def _sides(cohort: Mapping[str, Any]) -> list[tuple[str, Mapping[str, int]]]:
    order = {"train": "training", "validation": "validation", "test": "test"}
    return [(label, cohort["sides"][side]) for side, label in order.items()]


def _data(origin: Mapping[str, Any], data: Mapping[str, Mapping[str, str | None]]) -> str:
    lines = [
        f"Data: {origin['data_kind']} scans, hash `{origin['data_hash'][:8]}`. Split: {origin['split_method']}, hash "
        f"`{origin['split_hash'][:8]}`."
    ]
    for kind, entry in data.items():
        licence, attribution = (entry.get(key) or "not recorded" for key in ("licence", "attribution"))
        lines.append(f"Licence of the {kind} scans: {licence}. Attribution: {attribution}{_stop(attribution)}")
        if kind == "real" and (entry.get("licence") or entry.get("attribution")):
            # Nothing in a scan says whose it is, and an environment made for SPIDER's may have been given others.
            lines[-1] += " As the parameters state; nobody has checked it."
    return "\n\n".join(lines)


def _stop(text: str) -> str:
    return "" if text.endswith(".") else "."


def _scans(cohort: Mapping[str, Any]) -> str:
    sequences = ", ".join(f"{sequence} ({count})" for sequence, count in cohort["sequences"].items())
    smallest, largest = cohort["pixel_spacing_mm"]
    rows, columns = (f"{low:.2f} to {high:.2f}" for low, high in zip(smallest, largest, strict=True))
    return f"Series by sequence: {sequences}. Pixels as the net sees them: rows {rows} mm, columns {columns} mm."


def _figures(intervals: Iterable[Mapping[str, Any]]) -> str:
    from lumbarflow.labels import CLASSES
    from lumbarflow.metrics import MEAN_FOREGROUND
    from lumbarflow.statistics import LEVEL

    figures = {(row["scope"], row["class"], row["metric"]): row for row in intervals}
    columns = [column for column in COLUMNS if any((column[1], name, column[2]) in figures for name in CLASSES)]
    rows = [
        (name, *(_figure(figures.get((scope, name, metric)), digits) for _, scope, metric, digits in columns))
        for name in (*CLASSES[1:], MEAN_FOREGROUND)
    ]
    return (
        _table(("class", *(heading for heading, *_ in columns)), rows)
        + f"\n\nOn the scans' own grid. In brackets: {100 * LEVEL:g} % intervals, bootstrap over patients."
    )


def _figure(row: Mapping[str, Any] | None, digits: int) -> str:
    """A figure with its interval; a dash where there is none, no brackets where one patient leaves no interval."""
    if row is None or row["value"] is None:
        return "–"
    value = f"{row['value']:.{digits}f}"
    if row["low"] is not None and row["high"] is not None:
        value += f" [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
    # A structure that was missed has no distances: a mean over the others is the better for it.
    if row["scope"] == "case mean" and row.get("n_undefined"):
        value += f", {row['n_cases']} of {row['n_cases'] + row['n_undefined']} cases"
    return value


def _labels(labels: Mapping[str, Any]) -> str:
    table = "; ".join(f"{name} {_ranges(ids)}" for name, ids in labels["table"].items() if ids)
    return f"Ids in the masks that it learned from, by the method {labels['method']}: {table}."


def _ranges(ids: Iterable[int]) -> str:
    """Ids in words, as LabelTable reads them: 1, 2, 3, 7 -> "1-3, 7"."""
    runs: list[list[int]] = []
    for i in sorted(ids):
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _preprocessing(settings: Mapping[str, Any]) -> str:
    rows, columns = settings["size"]
    low, high = settings["percentiles"]
    moved = settings["test_time_augmentation"]
    augmentation = ", ".join(f"{key} {value:g}" for key, value in moved.items() if value) or "off"
    return (
        f"Slices of {rows} x {columns} pixels, aspect {'kept' if settings['keep_aspect'] else 'not kept'}; "
        f"normalisation {settings['normalisation']}, percentiles {low:g} to {high:g}; test-time augmentation: "
        f"{augmentation}."
    )


def _size_of(origin: Mapping[str, Any], cohort: Mapping[str, Any]) -> str:
    patients = {side: counts["patients"] for side, counts in cohort["sides"].items()}
    # Under a leaky split those who chose the epoch and those of the figures are not further patients.
    others = "some of them the same" if origin["leaky"] else "others"
    text = (
        f"Its weights come from {patients['train']} patients, its epoch was chosen by {patients['validation']} and its "
        f"figures come from {patients['test']}, {others}."
    )
    if origin["data_kind"] != "real":
        text += f" The scans are {origin['data_kind']}: the figures say nothing of a clinic's scans by themselves."
    return text


def _origin(origin: Mapping[str, Any]) -> str:
    commit = f", commit `{origin['git_commit'][:12]}`" if origin.get("git_commit") else ""
    if commit and origin.get("git_changed") == "true":
        commit += " with changes"
    return (
        f"MLflow run `{origin['run_id']}`; lumbarflow {origin['lumbarflow_version']}{commit}. Licence of the code that "
        "travels with the net: Apache-2.0."
    )


def _table(heading: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    heading = list(heading)
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
