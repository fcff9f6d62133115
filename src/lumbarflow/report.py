"""The report of a run: what it says, as a small document, and that document as HTML and as Markdown.

A document is a title and sections of text, tables and pictures. Both renderers read the same sections and format the
same cells, so the twins cannot differ in what they hold. The section builders are pure functions of the tables that
the pipelines write.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import combinations
from numbers import Integral, Real
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from lumbarflow.cohort import ABSENT, ACCEPTED, IGNORED, REJECTED
from lumbarflow.labels import CLASSES
from lumbarflow.metrics import MEAN_FOREGROUND
from lumbarflow.model_input import SIDES
from lumbarflow.uncertainty import calibration_error

# --- the document ----------------------------------------------------------------------------------------------------

MISSING = "–"
MISSING_NOTE = f"{MISSING} means undefined or not given; it is never zero."


@dataclass(frozen=True)
class Text:
    """Paragraphs, parted by empty lines; `code` in backticks and https addresses are shown as such."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table; the index of the frame is not shown.

    Attributes:
        formats: column -> format specification of its floats, where three decimals are not right.
        muted: one truth value per row, for rows that are not to be read like the others. HTML greys them; what it
            means must stand in a cell as well.
    """

    frame: pd.DataFrame
    caption: str
    formats: Mapping[str, str] = field(default_factory=dict)
    muted: Sequence[bool] = ()


@dataclass(frozen=True)
class Picture:
    """A PNG file. HTML holds it; Markdown links `file_name`, which must lie beside the document."""

    png: bytes
    alt: str
    caption: str
    file_name: str


@dataclass(frozen=True)
class Links:
    """Links to files that lie beside the document: what is shown of each -> its relative path."""

    paths: Mapping[str, str]


Block = Text | Table | Picture | Links


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


# --- cells, the same for both twins ----------------------------------------------------------------------------------

FLOATS = "z,.3f"  # z keeps a rounded -0.0001 from reading -0.000
_WORDS = {"iou": "IoU", "asd": "ASD", "hd95": "HD95", "nsd": "NSD", "f1": "F1", "dice": "Dice", "sd": "SD"}
_UNITS = ("mm", "mm3", "ml", "pixels", "seconds", "percent")
_COUNTS = re.compile(r"^n_|_(voxels|components|specks|pixels|n)$|^epochs?$")


def heading(column: str) -> str:
    """A column's name in words: `asd_mm` is "ASD (mm)", `nsd_2mm` "NSD at 2 mm"."""
    words = [_WORDS.get(word, word) for word in str(column).split("_")]
    if len(words) > 1 and words[-1] in _UNITS:
        return f"{' '.join(words[:-1])} ({words[-1]})"
    if tolerance := re.fullmatch(r"([\d.]+)mm", words[-1]):
        return f"{' '.join(words[:-1])} at {tolerance[1]} mm"
    return " ".join(words)


def cell_text(value: Any, specification: str = FLOATS) -> str:
    """One cell in words: numbers grouped by thousands, what is undefined as a dash, text on one line.

    Args:
        specification: of floats, as `format` takes it.
    """
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return MISSING
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{int(value):,}"
    if isinstance(value, Real):
        value = float(value)
        return format(value, specification) if math.isfinite(value) else "∞" if value > 0 else "-∞"
    return " ".join(str(value).split())


def _specification(table: Table, column: str) -> str:
    if column in table.formats:
        return table.formats[column]
    # Counts turn into floats beside an undefined one; they still are no fractions.
    values = table.frame[column].dropna()
    if _COUNTS.search(column) and all(isinstance(value, Real) and float(value).is_integer() for value in values):
        return ",.0f"
    return FLOATS


def _rows(table: Table) -> list[list[str]]:
    specifications = [_specification(table, column) for column in table.frame.columns]
    return [
        [cell_text(value, specification) for value, specification in zip(row, specifications, strict=True)]
        for row in table.frame.itertuples(index=False, name=None)
    ]


def _numeric(frame: pd.DataFrame) -> list[bool]:
    return [
        bool(len(values := frame[column].dropna()))
        and all(isinstance(value, Real) and not isinstance(value, bool | np.bool_) for value in values)
        for column in frame.columns
    ]


def _anchors(title: str, sections: Sequence[Section]) -> list[str]:
    """Names of the sections' headings, made as GitHub makes them, so that one list of contents fits both twins."""
    taken: dict[str, int] = {}
    anchors = []
    for text in (title, *(section.title for section in sections)):
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = taken.get(anchor, 0)
        taken[anchor] = count + 1
        anchors.append(f"{anchor}-{count}" if count else anchor)
    return anchors[1:]


_INLINE = re.compile(r"`(?P<code>[^`\n]+)`|(?P<address>https://[^\s`<>\"]*[^\s`<>\".,;:)])")


def _paragraphs(text: str) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


# --- HTML ------------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #c9c9c9; --band: #f1f1f1; --soft: #5a5a5a;
  --link: #0b57a4; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #161616; --line: #4a4a4a; --band: #262626; --soft: #b0b0b0; --link: #8ec5ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
p { max-width: 48rem; }
a { color: var(--link); }
code { background: var(--band); padding: 0 .2em; }
nav ul { columns: 16rem; padding-left: 1.2rem; }
figure { margin: 1.5rem 0; }
figcaption { margin-bottom: .4rem; max-width: 48rem; color: var(--soft); }
.box { overflow: auto; max-height: 40rem; }
.note { font-size: .85rem; color: var(--soft); margin: .3rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: normal; }
th { position: sticky; top: 0; background: var(--band); }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.muted td { color: var(--soft); font-style: italic; }
img { max-width: 100%; height: auto; background: #fff; }
@media print {
  body { max-width: none; }
  .box { overflow: visible; max-height: none; }
  tr, img { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""


def to_html(title: str, sections: Sequence[Section]) -> str:
    """The document as one HTML file that loads nothing: pictures are in it, style is in it, there is no script.

    A content security policy has the browser refuse everything else. All text is escaped.
    """
    anchors = _anchors(title, sections)
    contents = "".join(
        f'<li><a href="#{escape(anchor)}">{escape(section.title)}</a></li>\n'
        for anchor, section in zip(anchors, sections, strict=True)
    )
    body = "".join(
        f'<section id="{escape(anchor)}">\n<h2>{escape(section.title)}</h2>\n'
        + "".join(map(_block_html, section.blocks))
        + "</section>\n"
        for anchor, section in zip(anchors, sections, strict=True)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{escape(title)}</h1>\n</header>\n"
        f'<nav aria-label="Contents">\n<ul>\n{contents}</ul>\n</nav>\n<main>\n{body}</main>\n</body>\n</html>\n'
    )


def _block_html(block: Block) -> str:
    match block:
        case Text(text):
            return "".join(f"<p>{_inline_html(paragraph)}</p>\n" for paragraph in _paragraphs(text))
        case Table():
            return _table_html(block)
        case Picture(png, alt, caption):
            source = "data:image/png;base64," + base64.b64encode(png).decode()
            return (
                f"<figure>\n<figcaption>{_inline_html(caption)}</figcaption>\n"
                f'<img src="{source}" alt="{escape(alt)}">\n</figure>\n'
            )
        case Links(paths):
            items = (f'<li><a href="{escape(quote(path))}">{escape(text)}</a></li>\n' for text, path in paths.items())
            return f"<ul>\n{''.join(items)}</ul>\n"


def _table_html(table: Table) -> str:
    rows, numeric = _rows(table), _numeric(table.frame)
    style = [' class="number"' if is_number else "" for is_number in numeric]
    head = "".join(
        f'<th scope="col"{style}>{escape(heading(column))}</th>'
        for column, style in zip(table.frame.columns, style, strict=True)
    )
    muted = [*table.muted] or [False] * len(rows)
    body = "".join(
        ('<tr class="muted">' if is_muted else "<tr>")
        + "".join(f"<td{style}>{escape(cell)}</td>" for cell, style in zip(row, style, strict=True))
        + "</tr>\n"
        for row, is_muted in zip(rows, muted, strict=True)
    )
    note = f'<p class="note">{MISSING_NOTE}</p>\n' if any(MISSING in row for row in rows) else ""
    # The box scrolls by itself, by keyboard too: a wide table must not widen the page of a phone.
    return (
        f"<figure>\n<figcaption>{_inline_html(table.caption)}</figcaption>\n"
        f'<div class="box" role="region" tabindex="0" aria-label="{escape(table.caption)}">\n<table>\n'
        f"<thead>\n<tr>{head}</tr>\n</thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n{note}</figure>\n"
    )


def _inline_html(text: str) -> str:
    def mark(match: re.Match[str]) -> str:
        if match["code"]:
            return f"<code>{escape(match['code'])}</code>"
        return f'<a href="{escape(match["address"])}">{escape(match["address"])}</a>'

    return _replace_inline(text, mark, escape)


def _replace_inline(text: str, mark, plain) -> str:
    """`text` with code and addresses through `mark` and all between them through `plain`."""
    pieces, end = [], 0
    for match in _INLINE.finditer(text):
        pieces += [plain(text[end : match.start()]), mark(match)]
        end = match.end()
    return "".join([*pieces, plain(text[end:])])


# --- Markdown --------------------------------------------------------------------------------------------------------


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The document in GitHub's Markdown; its pictures are links to files that must lie beside it."""
    anchors = _anchors(title, sections)
    contents = [
        f"- [{_escape_markdown(section.title)}](#{quote(anchor)})"
        for anchor, section in zip(anchors, sections, strict=True)
    ]
    parts = [f"# {_escape_markdown(title)}", "\n".join(contents)]
    for section in sections:
        parts += [f"## {_escape_markdown(section.title)}", *map(_block_markdown, section.blocks)]
    return "\n\n".join(parts) + "\n"


def _block_markdown(block: Block) -> str:
    match block:
        case Text(text):
            return "\n\n".join(map(_inline_markdown, _paragraphs(text)))
        case Table():
            return _table_markdown(block)
        case Picture(_, alt, caption, file_name):
            return f"![{_escape_markdown(alt)}]({quote(file_name)})\n\n{_inline_markdown(caption)}"
        case Links(paths):
            return "\n".join(f"- [{_escape_markdown(text)}]({quote(path)})" for text, path in paths.items())


def _table_markdown(table: Table) -> str:
    rows = _rows(table)
    head = [heading(column) for column in table.frame.columns]
    rule = ["---:" if is_number else "---" for is_number in _numeric(table.frame)]
    lines = [[*map(_escape_markdown, head)], rule, *([*map(_escape_markdown, row)] for row in rows)]
    note = f"\n\n{MISSING_NOTE}" if any(MISSING in row for row in rows) else ""
    return f"{_inline_markdown(table.caption)}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + note


def _inline_markdown(text: str) -> str:
    def mark(match: re.Match[str]) -> str:
        return f"`{match['code']}`" if match["code"] else f"<{match['address']}>"

    escaped = _replace_inline(text, mark, _escape_markdown)
    # What would make a paragraph a heading, a list or a rule.
    return re.sub(r"^(\d*)([#+=.)-])", r"\1\\\2", escaped)


def _escape_markdown(text: str) -> str:
    """Text on one line that no Markdown or HTML in it can leave. Underscores inside words mark nothing on GitHub."""
    text = re.sub(r"([\\`*\[\]<>|~$&!])", r"\\\1", " ".join(text.splitlines()))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


# --- what the report says --------------------------------------------------------------------------------------------

NOT_A_DEVICE = (
    "Research software, not a medical device: nobody has validated it for diagnosis or treatment, and its figures come "
    "from few patients."
)
SPIDER_CITATION = (
    "Whoever shows results on SPIDER cites van der Graaf et al., Lumbar spine segmentation in MR images: a dataset and "
    "a public benchmark, Scientific Data 11:264, 2024 (data: https://doi.org/10.5281/zenodo.10159290, CC-BY-4.0)."
)
SYNTHETIC = "The scans are synthetic: the figures show that the software works, and nothing about patients."
LEAKY = (
    "The split is by slice: neighbouring slices of one patient stand on several sides, so the figures are too good. "
    "They serve to compare with the paper only."
)
_PROBABILITIES = {"p": ".2g", "p_holm": ".2g", "p_smallest": ".2g"}


def _warnings(manifest: Mapping[str, Any]) -> str:
    found = {
        "synthetic": SYNTHETIC,
        "mixed": "Some of the scans are synthetic: the figures mix them with patients.",
    }.get(manifest["data_kind"], "")
    return "\n\n".join(filter(None, [found, LEAKY if manifest["leaky"] else ""]))


def _patients(manifest: Mapping[str, Any]) -> int:
    """How many patients are scored."""
    return len({manifest["series"][name]["patient"] for name in manifest["sides"]["test"]})


def _listed(remarks: Sequence[str]) -> str:
    return "; ".join(filter(None, remarks))


def summary_section(by_class: pd.DataFrame, intervals: pd.DataFrame, manifest: Mapping[str, Any]) -> Section:
    """The figures first, with what makes them weak.

    Args:
        by_class, intervals: see `metrics_section`.
        manifest: of the model input; who is scored stands in it, since filters may leave out slices of the test side.
    """
    test = manifest["sides"]["test"]
    mean = _scope(by_class, "pooled").set_index("class").loc[MEAN_FOREGROUND, "dice"]
    slices = sum(map(len, test.values()))
    whom = f"{slices:,} slices of {len(test):,} series of {_patients(manifest):,} test patients"
    interval = _interval(intervals, "pooled", MEAN_FOREGROUND)
    spread = f" (95 % interval {interval[0]:.3f} to {interval[1]:.3f})" if np.isfinite(interval).all() else ""
    headline = (
        f"Mean foreground Dice {cell_text(mean)}{spread}: the mean over vertebrae, canal and IVD of the Dice pooled "
        f"over {whom}, on the scans' own grids."
    )
    table = _scope(by_class, "pooled")[["class", "dice", "iou", "precision", "recall"]]
    blocks = [Text("\n\n".join(filter(None, [headline, _warnings(manifest), NOT_A_DEVICE])))]
    return Section("Summary", [*blocks, Table(table, "Pooled over all scored slices, by class.")])


def cohort_section(
    ingest_report: pd.DataFrame,
    series_index: pd.DataFrame,
    slice_index: pd.DataFrame,
    filter_rules: pd.DataFrame | None = None,
) -> Section:
    """Who is in, and what was left out and why.

    Args:
        ingest_report: series, file, outcome, found, expected, what_to_do.
        series_index: the accepted series.
        slice_index: side, kept, reason for every slice (see `selection.index_slices`).
        filter_rules: what each reading of the imbalance rule would keep (see `selection.compare_rules`).
    """
    counts = ingest_report["outcome"].value_counts()
    left_out = ingest_report[ingest_report["outcome"] != ACCEPTED]
    dropped = int((~slice_index["kept"]).sum())
    text = (
        f"{counts.get(ACCEPTED, 0):,} series of {series_index['patient'].nunique():,} patients were accepted, "
        f"{counts.get(REJECTED, 0):,} rejected; {counts.get(IGNORED, 0):,} entries were ignored"
        f"{'; rows of overview.csv without files are counted below' if counts.get(ABSENT, 0) else ''}. "
        f"{int(series_index['synthetic'].astype(bool).sum()):,} of the accepted series are synthetic.\n\n"
        f"The slice filters left out {dropped:,} of {len(slice_index):,} slices."
    )
    sequences = [(name, rows) for name, rows in series_index.groupby("sequence")] + [("all", series_index)]
    accepted = pd.DataFrame(
        {
            "sequence": name,
            "patients": rows["patient"].nunique(),
            "series": len(rows),
            "slices": int(rows["n_slices"].sum()),
            **{
                f"median_{axis}_spacing_mm": float(rows[f"{axis}_spacing_mm"].median())
                for axis in ("row", "column", "slice")
            },
        }
        for name, rows in sequences
    )
    reasons = slice_index["reason"].where(~slice_index["kept"], "kept")
    filtered = slice_index.groupby(["side", reasons]).size().rename("slices").reset_index()
    filtered = filtered.sort_values("side", key=lambda side: side.map(SIDES.index), kind="stable")
    blocks: list[Block] = [Text(text), Table(accepted, "Accepted series.")]
    if len(left_out):
        blocks.append(Table(left_out, "What was left out."))
    blocks.append(Table(filtered, "Slices kept and left out by the filters, by side of the split."))
    if filter_rules is not None and len(filter_rules):
        blocks.append(
            Table(filter_rules, "What each reading of the paper's imbalance filter would keep, whichever is in force.")
        )
    return Section("Cohort", blocks)


def leakage_check(split: pd.DataFrame, series_index: pd.DataFrame) -> pd.DataFrame:
    """What stands on two sides of the split.

    Args:
        split: patient, series, slice, side.
        series_index: series, image_digest: two series of one digest are the same image under two names.
    Returns:
        One row per pair of sides: sides, patients, series, slices, image_files; 0 everywhere if nothing leaks.
    """
    digests = series_index.set_index("series")["image_digest"]
    columns = {
        "patients": split["patient"],
        "series": split["series"],
        "slices": pd.Series(list(zip(split["series"], split["slice"], strict=True)), split.index, dtype=object),
        "image_files": split["series"].map(digests),
    }

    def distinct(values: pd.Series, side: str) -> set:
        return set(values[split["side"] == side].dropna())

    return pd.DataFrame(
        {"sides": f"{first} and {second}"}
        | {name: len(distinct(values, first) & distinct(values, second)) for name, values in columns.items()}
        for first, second in combinations(SIDES, 2)
    )


def split_section(split: pd.DataFrame, series_index: pd.DataFrame, manifest: Mapping[str, Any]) -> Section:
    """Who stands on which side, and whether anybody or anything stands on two."""
    check = leakage_check(split, series_index)
    sides = pd.DataFrame(
        {
            "side": side,
            "patients": rows["patient"].nunique(),
            "series": rows["series"].nunique(),
            "slices": len(rows),
        }
        for side, rows in ((side, split[split["side"] == side]) for side in SIDES)
    )
    found = [
        f"no {word} on two sides" if not check[column].any() else f"{check[column].max():,} {words} on two sides"
        for column, word, words in (
            ("patients", "patient", "patients"),
            ("series", "series", "series"),
            ("image_files", "image file", "image files"),
        )
    ]
    text = f"The split is by the method `{manifest['split_method']}`. Leakage check: {', '.join(found)}."
    if check[["patients", "series", "image_files"]].to_numpy().any():
        text += " The largest number of any pair of sides is named."
    return Section(
        "Split and leakage check",
        [
            Text("\n\n".join(filter(None, [text, LEAKY if manifest["leaky"] else ""]))),
            Table(sides, "Sides of the split, before the slice filters."),
            Table(check, "What stands on both sides of each pair; image files are compared by digest, not by name."),
        ],
    )


_SCOPES = {
    "pooled": "all voxels of all scored slices taken together",
    "case mean": "mean over the cases (series) that have a figure",
    "slice mean": "mean over the slices that have a figure",
}


def metrics_section(by_class: pd.DataFrame, intervals: pd.DataFrame) -> Section:
    """All metrics by class and scope, and their intervals.

    Args:
        by_class: class, scope, metrics and their counts (see `metrics.table_by_class`). The scope "ceiling" has a
            section of its own.
        intervals: class, metric, low, high and counts, n_undefined and n_undefined_draws among them (see
            `statistics.patient_bootstrap` and `pooled_bootstrap`; a column `scope` tells which).
    """
    text = (
        "On the scans' own grids, with their own spacing. ASD: symmetric average surface distance; HD95: 95th "
        "percentile Hausdorff distance; NSD: share of the surfaces that agree within the tolerance; soft Dice: of the "
        "probabilities. A figure that does not exist is left out of a mean; the columns that begin with n count what "
        "each kind of figure is over, and what was missing."
    )
    tables = [
        Table(rows.drop(columns="scope"), f"By class, {scope}: {_SCOPES.get(scope, scope)}.")
        for scope, rows in by_class.groupby("scope", sort=False)
        if scope != "ceiling"
    ]
    shown = intervals.assign(metric=intervals["metric"].map(heading))
    caption = (
        "95 % intervals: bootstrap over patients, each drawn with all of its cases. The column n undefined counts the "
        "cases without the figure, n undefined draws the draws without it; the interval is over the others."
    )
    return Section("Metrics", [Text(text), *tables, Table(shown, caption)])


# What makes a row of the comparison no twin of our own; the mark stands before its source.
MARKS = {
    "†": (
        "the paper's protocol, in pixels of the net's grid: IoU, precision, recall and F1 are pooled over pixels; "
        "ASD and NSD are over one stack of all slices; Dice alone is averaged over slices, and soft (of the "
        "probabilities). Where a row departs from that, its caveat says so. Never to be set beside rows without the "
        "mark, but for F1"
    ),
    "‡": "published elsewhere: split by patient, but of other test patients, and averaged as the unit says",
    "§": "ours, split by slice: the test slices' neighbours were trained on",
}
COMPARISON_COLUMNS = [
    "mark", "source", "data", "split", "unit", "n", "class", "dice", "dice_low", "dice_high", "dice_sd", "iou",
    "precision", "recall", "f1", "asd", "asd_sd", "asd_unit", "nsd", "nsd_tolerance", "caveat",
]  # fmt: skip
_OVERLAPS = ("iou", "precision", "recall", "f1")
_NUMBERS = ("dice", "dice_low", "dice_high", "dice_sd", *_OVERLAPS, "asd", "asd_sd", "nsd")
F1_NOTE = (
    "F1 is the Dice of the decided pixels, pooled: the one figure of the paper's table that is of the same kind as our "
    "pooled Dice. Its split and its grid are still others."
)


def comparison_table(
    by_class: pd.DataFrame,
    intervals: pd.DataFrame,
    paper_metrics: pd.DataFrame,
    protocol: Mapping[str, Any],
    published: Sequence[Mapping[str, Any]],
    baselines: Sequence[Mapping[str, Any]],
    manifest: Mapping[str, Any],
) -> pd.DataFrame:
    """Our rows in both protocols, the paper's and the published baselines', each with its caveat.

    Args:
        by_class, intervals: see `metrics_section`; the scopes "pooled" and "case mean" are compared. An interval
            belongs to the scope it names in a column `scope`, else to "case mean".
        paper_metrics: our model under the paper's protocol (see `paper_protocol.paper_scores`); may be empty.
        protocol: the settings that paper_metrics were made with (`paper_protocol.SETTINGS`).
        published: the paper's rows: source, data, class, iou, dice, asd, nsd, precision, recall, f1, caveat.
        baselines: method, class, dice, dice_sd, asd_mm, asd_mm_sd, split, unit, source, perhaps data and caveat;
            what a source does not give is left out or null.
        manifest: of the model input.
    Returns:
        COMPARISON_COLUMNS, by class (foreground first, background last), marked as MARKS says. `n` tells what the Dice
        of our rows is over, e.g. "6 cases" or "120 slices"; the caveat counts what has no ASD.
    Raises:
        ValueError: a row of a class that is none.
    """
    leaky = "§" if manifest["leaky"] else ""
    caveats = [{"synthetic": "synthetic scans", "mixed": "partly synthetic scans"}.get(manifest["data_kind"], "")]
    if manifest["settings"]["split"].get("validation_is_test"):
        caveats.append("the epoch was chosen on the slices that are scored")
    chosen = manifest["sides"]["test"]
    sequences = ", ".join(sorted({manifest["series"][name]["sequence"] for name in chosen}))
    ours = {
        "source": "lumbarflow",
        "data": f"{sequences}, test patients: {_patients(manifest)}",
        "split": f"by {manifest['split_method']}" if manifest["split_method"] != "official" else "official",
    }
    tolerance = next((name for name in by_class if re.fullmatch(r"nsd_[\d.]+mm", name)), None)
    rows: list[dict[str, Any]] = []
    for scope in ("pooled", "case mean"):
        scored = _scope(by_class, scope)
        for record in scored.to_dict("records"):
            missed = record["n_missing_prediction"]
            low, high = _interval(intervals, scope, record["class"])
            rows.append(
                ours
                | {name: record[name] for name in ("class", "dice", *_OVERLAPS)}
                | {
                    "mark": leaky,
                    "unit": scope,
                    "n": _cases(scored, record),
                    "dice_low": low,
                    "dice_high": high,
                    "asd": record.get("asd_mm"),
                    "asd_unit": "mm",
                    "nsd": record[tolerance] if tolerance else None,
                    "nsd_tolerance": f"{tolerance[4:-2]} mm" if tolerance else "",
                    "caveat": _listed(
                        [*caveats, f"structures missed altogether, so without ASD: {missed}" if missed else ""]
                    ),
                }
            )
    paper = {"mark": "†", "unit": "paper's protocol", "asd_unit": "pixels"}
    height, width = manifest["size"]
    for record in paper_metrics.to_dict("records"):
        surfaces = "one stack of all slices" if protocol["stacked"] else "each slice by itself"
        whole, volumes = record["n_surface"], record["n_volumes"]
        lacking = f"ASD of {whole:,} of {volumes:,} volumes, the others lack the class" if whole < volumes else ""
        rows.append(
            ours
            | {name: record[name] for name in ("class", "dice", *_OVERLAPS, "nsd")}
            | paper
            | {
                "mark": f"†{leaky}",
                "n": f"{record['n_slices'] - record['n_undefined']:,} slices",
                "asd": record["asd_pixels"],
                "nsd_tolerance": f"{protocol['nsd_tolerance_pixels']:g} px",
                "caveat": _listed(
                    [*caveats, f"{protocol['dice']} Dice on {height} x {width} pixels, surfaces of {surfaces}", lacking]
                ),
            }
        )
    for record in published:
        rows.append(
            {name: record.get(name) for name in ("source", "data", "class", "dice", *_OVERLAPS, "asd", "nsd", "caveat")}
            | paper
            | {"split": "by slice", "nsd_tolerance": "1 px"}
        )
    for record in baselines:
        rows.append(
            {name: record.get(name) for name in ("data", "split", "unit", "class", "dice", "dice_sd")}
            | {
                "mark": "‡",
                "source": f"{record['method']} ({record['source']})",
                "asd": record.get("asd_mm"),
                "asd_sd": record.get("asd_mm_sd"),
                "asd_unit": "mm" if record.get("asd_mm") is not None else "",
                "caveat": record.get("caveat") or "other test patients",
            }
        )
    order = [*CLASSES[1:], MEAN_FOREGROUND, CLASSES[0]]
    unknown = sorted({str(row["class"]) for row in rows} - set(order))
    if unknown:
        raise ValueError(
            f"rows to compare are of the classes {unknown}; expected names from {order}. "
            "Correct the published rows in the configuration."
        )
    table = pd.DataFrame(rows, columns=COMPARISON_COLUMNS)
    table[[*_NUMBERS]] = table[[*_NUMBERS]].astype(float)
    words = [name for name in COMPARISON_COLUMNS if name not in _NUMBERS]
    table[words] = table[words].fillna("")
    return table.sort_values("class", key=lambda names: names.map(order.index), kind="stable", ignore_index=True)


def _cases(scored: pd.DataFrame, record: Mapping[str, Any]) -> str:
    """How many cases one row of a scope is over; the mean over the foreground is over those of its classes."""
    if record["scope"] == "pooled":
        return f"{record['n_cases']:,} cases"
    is_of = (
        scored["class"].isin(CLASSES[1:]) if record["class"] == MEAN_FOREGROUND else scored["class"] == record["class"]
    )
    counts = scored.loc[is_of, "n_overlap"]
    fewest, most = counts.min(), counts.max()
    return f"{most:,} cases" if fewest == most else f"{fewest:,} to {most:,} cases"


def comparison_section(table: pd.DataFrame, png: bytes) -> Section:
    """The comparison (see `comparison_table`) as picture and table, its marks explained."""
    marks = {mark: meaning for mark, meaning in MARKS.items() if table["mark"].str.contains(mark).any()}
    meanings = [f"{mark} {meaning}." for mark, meaning in marks.items()]
    if (table["mark"] == "").any():
        meanings.insert(
            0,
            "Rows without a mark are ours: split by patient, labels against labels on the scans' own grids, in "
            "millimetres.",
        )
    if "†" in marks:
        meanings.append(F1_NOTE)
        meanings.append(
            "What explains the difference to the paper: the split (see `Cost of leakage`); the measures, "
            "told apart by the two rows of our model; data, budget and selection of slices, not told apart here."
        )
    # The class first: rows are compared within it.
    shown = table[["class", "mark", *(name for name in table.columns if name not in ("class", "mark"))]]
    return Section(
        "Comparison with the paper and published baselines",
        [
            Text("\n\n".join(meanings)),
            Picture(
                png,
                "Dice of vertebrae, canal and IVD: one row per source; the table below holds the numbers.",
                "Dice by class and source. Hollow markers: another protocol.",
                "comparison.png",
            ),
            Table(
                shown,
                "Ours, the paper's and published baselines. ASD has its unit beside it; low and high are the 95 % "
                "interval, SD what the source gives; n is what the Dice of our rows is over.",
                muted=(table["mark"] != "").tolist(),
            ),
        ],
    )


def training_section(history: pd.DataFrame, record: Mapping[str, Any], png: bytes) -> Section:
    """The training curves, the best epoch and why training ended.

    Args:
        history: one row per epoch (see `training.fit`).
        record: best_epoch, stopped_by, hardware.
        png: `figures.training_curves`.
    """
    best = history.loc[history["epoch"] == record["best_epoch"], "val_mean_iou"].iloc[0]
    text = (
        f"{len(history):,} epochs in {history['seconds'].sum() / 60:.1f} minutes; ended by `{record['stopped_by']}`. "
        f"Kept: the weights of epoch {record['best_epoch']}, whose validation mean IoU is {best:.3f}."
    )
    return Section(
        "Training",
        [
            Text(text),
            Picture(
                png,
                f"Losses, validation mean IoU and learning rate over {len(history)} epochs; the best is epoch "
                f"{record['best_epoch']}.",
                "Training curves.",
                "training_curves.png",
            ),
            Table(history, "The epochs.", {"learning_rate": ".2e", "seconds": ",.1f", "slices_per_second": ",.1f"}),
        ],
    )


def confusion_section(confusion: Mapping[str, Any], png: bytes) -> Section:
    """The pooled confusion matrix.

    Args:
        confusion: classes (names) and counts (rows: reference, columns: prediction).
        png: `figures.confusion_figure`.
    """
    frame = pd.DataFrame(confusion["counts"], columns=[f"predicted {name}" for name in confusion["classes"]])
    frame.insert(0, "reference", confusion["classes"])
    return Section(
        "Confusion matrix",
        [
            Picture(
                png,
                "Confusion matrix of the four classes in shares of the reference; the table below holds the counts.",
                "Shares of the reference class, and voxels.",
                "confusion_matrix.png",
            ),
            Table(frame, "Voxels of all test slices: rows are the reference's class, columns the predicted one."),
        ],
    )


def reliability_section(reliability: pd.DataFrame, png: bytes) -> Section:
    """Whether the net's probabilities can be believed.

    Args:
        reliability: see `uncertainty.reliability_table`.
        png: `figures.reliability_figure`.
    """
    errors = pd.DataFrame(calibration_error(reliability).items(), columns=["class", "calibration_error"])
    return Section(
        "Reliability of the probabilities",
        [
            Picture(
                png,
                "How often the net was right over the probability that it gave; the table below sums it up.",
                "On the dashed line probabilities can be believed; below it the net is too sure, above it not enough.",
                "reliability.png",
            ),
            Table(
                errors,
                "Expected calibration error, over the pixels of all test slices whose probability is 1 % or more.",
            ),
        ],
    )


def cases_section(by_case: pd.DataFrame, png: bytes) -> Section:
    """Every case, and how the cases are spread.

    Args:
        by_case: series, patient, class, metrics (see `metrics.table_by_case`).
        png: `figures.case_distribution`.
    """
    foreground = by_case[by_case["class"] != CLASSES[0]]
    missing = int(foreground["dice"].isna().sum())
    text = (
        f"{by_case['series'].nunique():,} cases of {by_case['patient'].nunique():,} patients. "
        f"{missing:,} of {len(foreground):,} pairs of case and class have no Dice, since neither reference nor "
        "prediction holds the class."
    )
    return Section(
        "Cases",
        [
            Text(text),
            Picture(
                png,
                "Distribution of the cases' metrics by class; the table below holds every case.",
                "A dot for every case; boxes from the lower to the upper quartile, with the median.",
                "case_distribution.png",
            ),
            Table(foreground, "Every case and foreground class."),
        ],
    )


def viewer_section(pages: Sequence[str], command: str = "kedro run --pipeline=viewer") -> Section:
    """Where people can scroll through cases.

    Args:
        pages: names of the cases that have a page `viewer/<name>.html` beside the report.
    """
    if not pages:
        text = f"Not part of this run. `{command}`, with the `--env` of this run, makes pages to scroll through cases."
        return Section("Cases to scroll through", [Text(text)])
    text = (
        "Each page shows a case's volume with reference and prediction on it. The pages lie in `viewer`, beside this "
        f"file; `{command} --params=case=NAME` makes more."
    )
    return Section("Cases to scroll through", [Text(text), Links({name: f"viewer/{name}.html" for name in pages})])


def overlays_section(chosen: pd.DataFrame, png: bytes) -> Section:
    """Best, median and worst case as pictures with error maps.

    Args:
        chosen: the cases shown, in the picture's order: case ("best", "median", "worst"), series, slice, dice (mean
            over the foreground classes).
        png: `figures.overlay_figure`.
    """
    named = "; ".join(f"{row.case}: {row.series}, slice {row.slice}" for row in chosen.itertuples())
    return Section(
        "Best, median and worst case",
        [
            Text(
                "Ranked by the case's mean foreground Dice; of each, the tested slice with the most foreground. The "
                "last column maps the errors: what was predicted wrongly in its colour, what was missed in green."
            ),
            Picture(
                png,
                f"Image, reference, prediction and errors of three cases. {named}.",
                "From left: the image, the reference, the prediction, and where the two differ.",
                "overlays.png",
            ),
            Table(chosen, "The cases shown."),
        ],
    )


def ceiling_section(by_class: pd.DataFrame, manifest: Mapping[str, Any]) -> Section:
    """What the net's input size alone costs: the scope "ceiling" of `metrics_section`'s table."""
    height, width = manifest["size"]
    pooled = _scope(by_class, "pooled").set_index("class")["dice"]
    table = _scope(by_class, "ceiling")[["class", "dice", "iou", "precision", "recall"]]
    table = table.assign(model_dice=table["class"].map(pooled))
    return Section(
        "Size ceiling",
        [
            Text(
                f"The net sees {height} x {width} pixels. The references themselves, resampled to that size and back, "
                "score what this table says: no net of that size is expected above it. Both are of the scored slices "
                "alone."
            ),
            Table(table, "The references, there and back, and the model's pooled Dice beside them."),
        ],
    )


def hardware_section(record: Mapping[str, Any], run_times: pd.DataFrame) -> Section:
    """Where the model was trained, and how long the steps took.

    Args:
        record: `hardware` (see `backend.describe_hardware`).
        run_times: one row per step with its `seconds`; may be empty.
    """
    blocks: list[Block] = [Table(_settings(record["hardware"]), "The machine that trained.")]
    if len(run_times):
        caption = (
            "The last run of each pipeline; nets that had been trained before were taken, and their time is not in it."
        )
        blocks.append(Table(run_times, caption, {"seconds": ",.1f"}))
    else:
        blocks.append(Text("No run times were recorded."))
    return Section("Run time and hardware", blocks)


def leakage_section(table: pd.DataFrame | None, command: str = "kedro run --pipeline=leakage") -> Section:
    """What a split by slice would have made of the same model.

    Args:
        table: scope, class, metric, slice_split, patient_split, difference, the limits slice_low, slice_high,
            patient_low and patient_high, slice_n and patient_n (scored slices), epochs (see
            `comparison.leakage_table`).
    """
    text = (
        "The same net, trained anew and scored under both splits: what the figures gain when slices of one patient "
        "stand on both sides. Neither is the model of the rest of this report."
    )
    if table is not None and len(table):
        text = f"{text}\n\n{_leak(table)}"
    return _optional("Cost of leakage", text, command, {"Split by slice against split by patient.": table})


def _leak(table: pd.DataFrame) -> str:
    """The pooled mean foreground Dice of both splits in a sentence; none if it was not compared or is undefined."""
    is_headline = (table["scope"] == "pooled") & (table["class"] == MEAN_FOREGROUND) & (table["metric"] == "dice")
    rows = table[is_headline & table["difference"].notna()]
    if rows.empty:
        return ""
    row = rows.iloc[0]
    limits = [row[f"{run}_{limit}"] for run in ("slice", "patient") for limit in ("low", "high")]
    spread = (
        ", 95 % intervals {:.3f} to {:.3f} and {:.3f} to {:.3f}".format(*limits) if np.isfinite(limits).all() else ""
    )
    change = f"adds {row['difference']:.3f} to" if row["difference"] >= 0 else f"takes {-row['difference']:.3f} from"
    return (
        f"Splitting by slice {change} the pooled mean foreground Dice ({row['slice_split']:.3f} against "
        f"{row['patient_split']:.3f}{spread}). Both nets had the same budget of {row['epochs']:,} epochs. It is one "
        f"seed, the test slices differ ({row['slice_n']:,} of the split by slice, {row['patient_n']:,} of that by "
        "patient), and the split by slice trains on slices of nearly all patients."
    )


def baselines_section(
    table: pd.DataFrame | None, tests: pd.DataFrame | None, command: str = "kedro run --pipeline=baselines"
) -> Section:
    """Our own baselines under one budget, and the paired tests between them.

    Args:
        table: one row per net and class (see `comparison.baselines_table`).
        tests: see `statistics.paired_wilcoxon`.
    """
    text = (
        "Each net was trained for this comparison, under one budget and on the same split, and scored in the same way; "
        "the paper's net as well, which is not the model of the rest of this report. An atlas is counted, not trained."
    )
    if tests is not None and len(tests) and tests["p_smallest"].notna().any():
        least = tests.loc[tests["p_smallest"].idxmin()]
        text += (
            f"\n\nWith {least['n_patients']:,} patients, no p can fall below {least['p_smallest']:.2g}, even before "
            "Holm's correction."
        )
    tables = {
        "By net and class. Dice is pooled, with its 95 % interval; surface figures are means over cases; the column "
        "precision is that of the arithmetic in training.": table,
        "Paired Wilcoxon tests over patients; p (Holm) is corrected for the number of tests.": tests,
    }
    return _optional("Baselines of our own", text, command, tables)


def external_section(
    table: pd.DataFrame | None,
    left_out: pd.DataFrame | None,
    command: str = "kedro run --pipeline=evaluate_external",
) -> Section:
    """Masks that another program made of the series.

    Args:
        table: metrics by class.
        left_out: series, file, outcome, found, expected, what_to_do of the series without a usable mask.
    """
    text = "Masks of another program, scored in the same way on the series it has masks of. They have no soft Dice."
    tables = {"External predictions, by class.": table, "Series that were not scored.": left_out}
    return _optional("External predictions", text, command, tables)


def apta_section(table: pd.DataFrame | None, command: str = "kedro run --pipeline=apta_audit") -> Section:
    """What the paper's adaptive pixel transformation changes in the reference masks."""
    text = (
        "The paper's adaptive pixel transformation (APTA) against the direct map from label ids to classes, which is "
        "what this project trains on unless `labels.method` says otherwise."
    )
    return _optional("APTA audit", text, command, {"What APTA changes.": table})


def _optional(title: str, text: str, command: str, tables: Mapping[str, pd.DataFrame | None]) -> Section:
    """A section of tables that another pipeline makes: empty before it has run, None if they are not of this data."""
    makes = f"`{command}`, with the `--env` and the `--params` of this run, makes"
    if any(table is None for table in tables.values()):
        return Section(
            title, [Text(f"Left out: what is there was made from other data, or does not say. {makes} it anew.")]
        )
    present = {caption: table for caption, table in tables.items() if len(table)}
    if not present:
        return Section(title, [Text(f"Not part of this run. {makes} it.")])
    return Section(title, [Text(text), *(Table(table, caption, _PROBABILITIES) for caption, table in present.items())])


_MODEL_SECTIONS = ("model", "loss", "training", "augmentation")
_EVALUATION_SECTIONS = ("evaluation", "paper_protocol")
NOT_RECORDED = "not recorded"


def provenance_section(
    manifest: Mapping[str, Any], record: Mapping[str, Any], evaluation: Mapping[str, Any]
) -> Section:
    """Where the figures come from, and whom to cite.

    What is shown is what the model and its figures were made with, which a later configuration may not say.

    Args:
        manifest: of the model input, with its hashes and `settings`.
        record: of the training; `settings` (model, loss, training, augmentation), git_commit and git_changed are
            called not recorded where an older record lacks them.
        evaluation: the settings `evaluation` and `paper_protocol` that the figures were made with, git_commit and
            git_changed; the same.
    """
    hashes = {name: manifest[name] for name in ("data_kind", "data_hash", "split_hash", "content_hash")}
    commits = {"trained_at_git_commit": _commit(record), "evaluated_at_git_commit": _commit(evaluation)}
    trained = record.get("settings", {})
    parameters = (
        dict(manifest["settings"])
        | {name: trained.get(name, NOT_RECORDED) for name in _MODEL_SECTIONS}
        | {name: evaluation.get(name, NOT_RECORDED) for name in _EVALUATION_SECTIONS}
    )
    text = NOT_A_DEVICE
    if manifest["data_kind"] != "synthetic":
        text += f"\n\n{SPIDER_CITATION}"
    text += (
        "\n\nThe method is after Ahmed et al., Pioneering Precision in Lumbar Spine MRI Segmentation with Advanced "
        "Deep Learning and Data Enhancement, https://arxiv.org/abs/2409.06018 (2024)."
    )
    return Section(
        "Provenance",
        [
            Text(text),
            Table(_settings(commits | hashes), "The code and the data."),
            Table(_settings(parameters), "Parameters of the model and of its evaluation, seeds among them."),
        ],
    )


def _commit(facts: Mapping[str, Any]) -> str:
    """The commit that something was made at; changes that no commit holds are not hidden behind it."""
    changed = str(facts.get("git_changed", "")).lower() == "true"
    return facts.get("git_commit", NOT_RECORDED) + (", with uncommitted changes" if changed else "")


def _settings(values: Mapping[str, Any]) -> pd.DataFrame:
    """Nested settings, one row each: name (dotted) and value, as text: a seed takes no thousands separator."""

    def rows(prefix: str, value: Any):
        if isinstance(value, Mapping) and value:
            for name, inner in value.items():
                yield from rows(f"{prefix}.{name}" if prefix else str(name), inner)
        else:
            yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    return pd.DataFrame(rows("", values), columns=["name", "value"])


def _scope(by_class: pd.DataFrame, scope: str) -> pd.DataFrame:
    rows = by_class[by_class["scope"] == scope]
    if rows.empty:
        raise ValueError(
            f"the metrics by class have the scopes {sorted(by_class['scope'].unique())}; expected {scope!r} too. "
            "Run evaluate again."
        )
    return rows


def _interval(intervals: pd.DataFrame, scope: str, name: str) -> tuple[float, float]:
    """The interval of the Dice of one class and scope; NaN where there is none."""
    rows = intervals[(intervals["class"] == name) & (intervals["metric"] == "dice")]
    rows = rows[rows["scope"] == scope] if "scope" in rows else rows if scope == "case mean" else rows.iloc[:0]
    return (float(rows["low"].iloc[0]), float(rows["high"].iloc[0])) if len(rows) else (math.nan, math.nan)
