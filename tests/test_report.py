from __future__ import annotations

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumbarflow import report
from lumbarflow.labels import CLASSES
from lumbarflow.metrics import MEAN_FOREGROUND
from lumbarflow.report import Picture, Section, Table, Text, to_html, to_markdown
from lumbarflow.uncertainty import reliability_table

PNG = b"\x89PNG\r\n\x1a\n, a picture"
VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = '<b>a|b</b> "q" `c` [d](http://e) *f* _g_ &amp; $h$ \\'


class Page(HTMLParser):
    """What a browser would make of the document; fails on tags that do not match."""

    def __init__(self, document: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.tables: list[list[list[str]]] = []
        self.words: list[str] = []
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.tags if name in attributes]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def markdown_tables(document: str) -> list[list[list[str]]]:
    """The tables as GitHub reads them: cells parted by bars that no backslash escapes; without the rule."""
    tables, previous = [], ""
    for line in document.splitlines():
        if line.startswith("| "):
            if not previous.startswith("| "):
                tables.append([])
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            tables[-1].append([re.sub(r"\\(.)", r"\1", cell.strip()) for cell in cells])
        previous = line
    return [[table[0], *table[2:]] for table in tables]


def numbers(cells: list[str]) -> list[float]:
    return [np.nan if cell == "–" else float(cell.replace(",", "").replace("∞", "inf")) for cell in cells]


@pytest.fixture(scope="module")
def sections() -> list[Section]:
    frame = pd.DataFrame(
        {
            "series": [HOSTILE, "2_t2_SPACE"],
            "dice": [0.91249, np.nan],
            "asd_mm": [1234.5, -0.0001],
            "reference_voxels": [1234567, 0],
            "n_undefined": [np.nan, 3.0],
            "whole": [True, False],
        },
        index=[7, 9],
    )
    return [
        Section("Cases", [Text("One <i>.\n\nTwo `a|b` see https://doi.org/10.5281/x_y, then."), Table(frame, "All.")]),
        Section("Cases", [Picture(PNG, 'of "x" [y]', "A picture.", "a picture.png")]),
    ]


# --- the document ----------------------------------------------------------------------------------------------------


def test_both_twins_hold_the_frames_values_under_the_same_heads(sections):
    page, markdown = Page(to_html("Title", sections)), to_markdown("Title", sections)
    for table in (page.tables[0], markdown_tables(markdown)[0]):
        head, *rows = table
        assert head == ["series", "Dice", "ASD (mm)", "reference voxels", "n undefined", "whole"]
        columns = list(zip(*rows, strict=True))
        assert columns[0] == (HOSTILE, "2_t2_SPACE")
        np.testing.assert_equal(numbers(columns[1]), [0.912, np.nan])
        assert columns[2] == ("1,234.500", "0.000")  # no negative zero
        assert columns[3] == ("1,234,567", "0")
        assert columns[4] == ("–", "3")  # a count, though the gap made floats of it
        assert columns[5] == ("yes", "no")


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"])),
            st.floats(-1e6, 1e6) | st.just(float("nan")),
            st.integers(-(10**9), 10**9),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_table_reads_the_same_from_both_twins(rows):
    frame = pd.DataFrame(rows, columns=["series", "dice", "slices"])
    sections = [Section("Any", [Table(frame, "Any.")])]
    html, markdown = (Page(to_html("T", sections)).tables[0], markdown_tables(to_markdown("T", sections))[0])
    assert html == markdown
    names, dice, slices = zip(*html[1:], strict=True)
    assert list(names) == [" ".join(name.split()) for name in frame["series"]]
    np.testing.assert_allclose(numbers(dice), frame["dice"], atol=5.001e-4)
    assert numbers(slices) == frame["slices"].tolist()


def test_names_from_users_files_cannot_leave_their_cell(sections):
    html, markdown = to_html(HOSTILE, sections), to_markdown(HOSTILE, sections)
    page = Page(html)
    assert not {"b", "i", "script"} & {tag for tag, _ in page.tags}
    assert "<b>" not in html
    assert page.text.startswith(HOSTILE)  # the title, too
    assert not re.search(r"(?<!\\)<(?!https://)", markdown)
    assert r"\<b\>a\|b\</b\>" in markdown
    assert r" \_g\_ " in markdown
    assert "2_t2_SPACE" in markdown  # inside a word it marks nothing, and reads better bare


def test_the_html_loads_nothing_and_forbids_everything_but_its_own_style_and_pictures(sections):
    page = Page(to_html("Title", sections))
    assert [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object")] == []
    assert page.attributes("src") == ["data:image/png;base64,iVBORw0KGgosIGEgcGljdHVyZQ=="]  # PNG, by hand
    assert page.attributes("href") == ["#cases", "#cases-1", "https://doi.org/10.5281/x_y"]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'", "style-src": "'unsafe-inline'", "img-src": "data:", "base-uri": "'none'",
        "form-action": "'none'",
    }  # fmt: skip


def test_the_html_says_what_readers_and_their_aids_need(sections):
    html = to_html("Title", sections)
    page = Page(html)
    assert ("html", {"lang": "en"}) in page.tags
    assert [attributes["alt"] for tag, attributes in page.tags if tag == "img"] == ['of "x" [y]']
    heads = [attributes for tag, attributes in page.tags if tag == "th"]
    assert {attributes["scope"] for attributes in heads} == {"col"}
    assert [attributes.get("class") for attributes in heads] == [None, "number", "number", "number", "number", None]
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section"] == ["cases", "cases-1"]
    boxes = [attributes for tag, attributes in page.tags if attributes.get("class") == "box"]
    assert boxes == [{"class": "box", "role": "region", "tabindex": "0", "aria-label": "All."}]
    for wanted in ("prefers-color-scheme: dark", "@media print", "width=device-width"):
        assert wanted in html


def test_paragraphs_code_and_addresses_are_told_apart(sections):
    html, markdown = to_html("Title", sections), to_markdown("Title", sections)
    assert "<p>One &lt;i&gt;.</p>\n<p>Two <code>a|b</code> see " in html
    assert '<a href="https://doi.org/10.5281/x_y">https://doi.org/10.5281/x_y</a>, then.</p>' in html
    assert "One \\<i\\>.\n\nTwo `a|b` see <https://doi.org/10.5281/x_y>, then.\n" in markdown


@pytest.mark.parametrize("start", ["# x", "- x", "+ x", "12. x", "1) x", "=== x"])
def test_a_paragraph_stays_a_paragraph_in_markdown(start):
    assert re.search(r"^\d*\\[#+=.)-]", to_markdown("T", [Section("S", [Text(start)])]).splitlines()[-1])


def test_markdown_lists_its_sections_and_links_its_pictures(sections):
    markdown = to_markdown("Title", sections)
    assert markdown.startswith("# Title\n\n- [Cases](#cases)\n- [Cases](#cases-1)\n\n## Cases\n")
    assert '![of "x" \\[y\\]](a%20picture.png)\n\nA picture.' in markdown
    assert "| --- | ---: | ---: | ---: | ---: | --- |" in markdown


def test_a_section_called_like_the_title_gets_an_anchor_of_its_own():
    # GitHub numbers headings that repeat, the title among them.
    assert "(#report-1)" in to_markdown("Report", [Section("Report", [])])
    assert 'id="report-1"' in to_html("Report", [Section("Report", [])])


def test_the_dash_is_explained_only_where_it_stands():
    gap, full = (pd.DataFrame({"dice": [value]}) for value in (np.nan, 0.5))
    for render in (to_html, to_markdown):
        assert report.MISSING_NOTE in render("T", [Section("S", [Table(gap, "C")])])
        assert report.MISSING_NOTE not in render("T", [Section("S", [Table(full, "C")])])


def test_rows_of_another_kind_are_muted():
    table = Table(pd.DataFrame({"mark": ["", "†"]}), "C", muted=[False, True])
    rows = [attributes for tag, attributes in Page(to_html("T", [Section("S", [table])])).tags if tag == "tr"]
    assert rows == [{}, {}, {"class": "muted"}]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"), (np.float32(0.5), "0.500"), (1e6, "1,000,000.000"), (float("inf"), "∞"),
        (-np.inf, "-∞"), (np.int64(1234), "1,234"), (np.bool_(True), "yes"), (None, "–"), (pd.NA, "–"), (pd.NaT, "–"),
        ("", ""), (" a\n b ", "a b"), ([0.5, 99.5], "[0.5, 99.5]"),
    ],
)  # fmt: skip
def test_cells_in_words(value, text):
    assert report.cell_text(value) == text


def test_a_column_takes_its_own_format():
    table = Table(pd.DataFrame({"p": [0.03125], "epochs": [3.0], "slice_n": [7.0]}), "C", {"p": ".2g"})
    assert Page(to_html("T", [Section("S", [table])])).tables[0][1] == ["0.031", "3", "7"]


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("asd_mm", "ASD (mm)"), ("hd95_mm", "HD95 (mm)"), ("nsd_2mm", "NSD at 2 mm"), ("nsd_0.5mm", "NSD at 0.5 mm"),
        ("volume_error_ml", "volume error (ml)"), ("n_cases", "n cases"), ("f1", "F1"), ("IVD", "IVD"),
        ("soft_dice", "soft Dice"), ("n", "n"), ("patient_n", "patient n"), ("seconds", "seconds"),
    ],
)  # fmt: skip
def test_columns_in_words(column, words):
    assert report.heading(column) == words


# --- what the report says --------------------------------------------------------------------------------------------


@pytest.fixture
def tables() -> SimpleNamespace:
    """A cohort of four patients, one of whom has two series; one test patient of two slices, one of them scored."""
    names = ["1_t1", "1_t2", "2_t2", "3_t2", "4_t2"]
    patients, slices = ["1", "1", "2", "3", "4"], [2, 3, 4, 2, 3]
    series_index = pd.DataFrame(
        {
            "series": names,
            "patient": patients,
            "sequence": ["t1", "t2", "t2", "t2", "t2"],
            "n_slices": slices,
            "synthetic": False,
            "row_spacing_mm": [0.5, 0.6, 0.7, 0.9, 0.6],
            "column_spacing_mm": 0.4,
            "slice_spacing_mm": 4.4,
            "image_digest": ["a", "b", "c", "d", "e"],
        }
    )
    side = dict(zip(names, ["train", "train", "train", "test", "validation"], strict=True))
    split = pd.DataFrame(
        [
            {"patient": patient, "sequence": "t2", "series": name, "slice": index, "side": side[name]}
            for name, patient, count in zip(names, patients, slices, strict=True)
            for index in range(count)
        ]
    )
    slice_index = split.assign(reason="")
    slice_index.loc[[0, 4], "reason"] = "fewer than 4 classes"
    slice_index["kept"] = slice_index["reason"] == ""
    ingest_report = pd.DataFrame(
        [{"series": name, "file": f"{name}.mha", "outcome": "accepted"} for name in names]
        + [
            {
                "series": "5_t2", "file": "5_t2.mha", "outcome": "rejected", "found": "label 77",
                "expected": "known labels", "what_to_do": "list it",
            },
            {"file": "x.txt", "outcome": "ignored", "found": "not a volume file"},
        ]
    ).fillna("")  # fmt: skip
    rows = []
    for offset, scope in ((0.0, "pooled"), (0.01, "case mean"), (0.02, "slice mean"), (0.09, "ceiling")):
        dice = dict(zip(CLASSES, (0.85, 0.7, 0.75, 0.8), strict=True)) | {MEAN_FOREGROUND: 0.75}
        rows += [
            {"class": name, "scope": scope, "dice": value + offset, "iou": 0.5, "precision": 0.6, "recall": 0.7,
             "f1": value + offset, "asd_mm": np.nan if name == "background" else 1.5, "nsd_1mm": 0.25, "nsd_2mm": 0.5,
             "n_cases": 1, "n_slices": 1, "n_undefined": 0, "n_missing_prediction": 0,
             "n_overlap": 3 if name == MEAN_FOREGROUND else 1}
            for name, value in dice.items()
        ]  # fmt: skip
    intervals = pd.DataFrame(
        [("canal", "dice", 0.76, 0.7, 0.81, 1, 0, np.nan), ("canal", "asd_mm", 1.5, 1.1, 2.2, 1, 0, 3.0)],
        columns=["class", "metric", "value", "low", "high", "n_cases", "n_undefined", "n_undefined_draws"],
    )
    manifest = {
        "size": [128, 96],
        "data_kind": "real",
        "leaky": False,
        "split_method": "patient",
        "data_hash": "d0",
        "split_hash": "d1",
        "content_hash": "d2",
        "settings": {
            "preprocess": {"size": [128, 96]},
            "split": {"method": "patient", "validation_is_test": False},
        },
        "sides": {"test": {"3_t2": [1]}},
        "series": {
            name: {"patient": patient, "sequence": name[2:]} for name, patient in zip(names, patients, strict=True)
        },
    }
    return SimpleNamespace(
        series_index=series_index, split=split, slice_index=slice_index, ingest_report=ingest_report,
        by_class=pd.DataFrame(rows), intervals=intervals, manifest=manifest,
    )  # fmt: skip


def words(section: Section) -> str:
    return "\n".join(block.text for block in section.blocks if isinstance(block, Text))


def frames(section: Section) -> list[pd.DataFrame]:
    to_html("T", [section]), to_markdown("T", [section])  # every section can be drawn
    return [block.frame for block in section.blocks if isinstance(block, Table)]


def test_the_summary_gives_the_headline_and_whom_it_is_of(tables):
    section = report.summary_section(tables.by_class, tables.intervals, tables.manifest)
    assert "Mean foreground Dice 0.750: " in words(section)
    assert "over 1 slices of 1 series of 1 test patients" in words(section)  # the filters left out the other one
    assert "not a medical device" in words(section)
    assert frames(section)[0]["dice"].tolist() == [0.85, 0.7, 0.75, 0.8, 0.75]
    pooled = pd.DataFrame([{"scope": "pooled", "class": MEAN_FOREGROUND, "metric": "dice", "low": 0.7, "high": 0.8}])
    section = report.summary_section(tables.by_class, pooled, tables.manifest)
    assert "0.750 (95 % interval 0.700 to 0.800): " in words(section)
    test = {"1_t1": [0, 1], "1_t2": [2], "3_t2": [0, 1, 2]}
    section = report.summary_section(tables.by_class, pooled, tables.manifest | {"sides": {"test": test}})
    assert "over 6 slices of 3 series of 2 test patients" in words(section)


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"data_kind": "synthetic"}, report.SYNTHETIC),
        ({"data_kind": "mixed"}, "Some of the scans are synthetic"),
        ({"leaky": True}, report.LEAKY),
    ],
)
def test_the_summary_warns_of_what_makes_its_figures_weak(tables, change, warning):
    def summary(manifest):
        return words(report.summary_section(tables.by_class, tables.intervals, manifest))

    assert warning in summary(tables.manifest | change)
    assert warning not in summary(tables.manifest)


def test_metrics_that_lack_a_scope_are_refused(tables):
    by_class = tables.by_class[tables.by_class["scope"] != "pooled"]
    with pytest.raises(ValueError, match=r"scopes \['case mean', 'ceiling', 'slice mean'\]; expected 'pooled' too"):
        report.summary_section(by_class, tables.intervals, tables.manifest)


def test_the_cohort_names_what_was_left_out_and_why(tables):
    rules = pd.DataFrame([{"rule": "largest_share", "sequence": "all", "kept": 3, "dropped": 9}])
    section = report.cohort_section(tables.ingest_report, tables.series_index, tables.slice_index, rules)
    assert "5 series of 4 patients were accepted, 1 rejected; 1 entries were ignored." in words(section)
    assert "left out 2 of 14 slices" in words(section)
    accepted, left_out, filtered, compared = frames(section)
    assert accepted.loc[0, ["sequence", "patients", "series", "slices", "median_row_spacing_mm"]].tolist() == [
        "t1", 1, 1, 2, 0.5,
    ]  # fmt: skip
    assert accepted.loc[2, ["sequence", "patients", "series", "slices", "median_row_spacing_mm"]].tolist() == [
        "all", 4, 5, 14, 0.6,
    ]  # fmt: skip
    assert left_out["found"].tolist() == ["label 77", "not a volume file"]
    assert filtered.to_numpy().tolist() == [
        ["train", "fewer than 4 classes", 2], ["train", "kept", 7], ["validation", "kept", 3], ["test", "kept", 2],
    ]  # fmt: skip
    assert compared is rules
    plain = report.cohort_section(tables.ingest_report.iloc[:5], tables.series_index, tables.slice_index)
    assert len(frames(plain)) == 2  # nothing was left out, and no rules were compared


def test_a_sound_split_is_called_so_plainly(tables):
    section = report.split_section(tables.split, tables.series_index, tables.manifest)
    assert "no patient on two sides, no series on two sides, no image file on two sides." in words(section)
    sides, check = frames(section)
    assert sides.to_numpy().tolist() == [["train", 2, 3, 9], ["validation", 1, 1, 3], ["test", 1, 1, 2]]
    assert check["sides"].tolist() == ["train and validation", "train and test", "validation and test"]
    assert (check.drop(columns="sides") == 0).all(axis=None)


def test_what_stands_on_two_sides_is_counted_by_pair(tables):
    split = tables.split.copy()
    split.loc[0, "side"] = "test"  # a slice of 1_t1
    split = pd.concat([split, split[split["series"] == "4_t2"].iloc[:2].assign(side="train")], ignore_index=True)
    series_index = tables.series_index.assign(image_digest=["a", "b", "d", "d", "e"])  # 2_t2 and 3_t2: one image
    check = report.leakage_check(split, series_index).set_index("sides")
    assert check.loc["train and test"].to_dict() == {"patients": 1, "series": 1, "slices": 0, "image_files": 2}
    assert check.loc["train and validation"].to_dict() == {"patients": 1, "series": 1, "slices": 2, "image_files": 1}
    assert check.loc["validation and test"].to_dict() == {"patients": 0, "series": 0, "slices": 0, "image_files": 0}
    section = report.split_section(split, series_index, tables.manifest | {"leaky": True})
    assert "1 patients on two sides, 1 series on two sides, 2 image files on two sides." in words(section)
    assert report.LEAKY in words(section)


def test_metrics_stand_by_scope_with_their_counts_and_intervals(tables):
    section = report.metrics_section(tables.by_class, tables.intervals)
    *scopes, intervals = frames(section)
    assert [frame["dice"].iloc[0] for frame in scopes] == [0.85, 0.86, 0.87]  # the ceiling has its own section
    assert all("n_undefined" in frame for frame in scopes)
    assert intervals["metric"].tolist() == ["Dice", "ASD (mm)"]
    assert intervals["low"].tolist() == [0.7, 1.1]
    assert "n undefined draws the draws without it" in section.blocks[-1].caption
    assert [row[-1] for row in Page(to_html("T", [section])).tables[-1]] == ["n undefined draws", "–", "3"]


PUBLISHED = [
    {"source": "Ahmed et al. 2024", "caveat": "soft Dice", "data": "T2 SPACE", "class": "canal", "iou": 0.9501,
     "dice": 0.9671, "asd": 0.0361, "nsd": 0.9963, "precision": 0.9761, "recall": 0.9727, "f1": 0.9744},
]  # fmt: skip
BASELINES = [
    {"method": "nnU-Net", "class": "canal", "dice": 0.92, "dice_sd": 0.03, "asd_mm": 0.37, "asd_mm_sd": 0.22,
     "split": "official", "unit": "mean over scans", "source": "van der Graaf 2024"},
    {"method": "SPINEPS", "class": "vertebrae", "dice": 0.929, "dice_sd": None, "asd_mm": None, "asd_mm_sd": None,
     "split": "official", "unit": "instances", "source": "Möller 2024", "caveat": "instances, not classes"},
]  # fmt: skip
PAPER = pd.DataFrame(
    [{"class": "canal", "iou": 0.8, "dice": 0.88, "asd_pixels": 0.4, "nsd": 0.9, "precision": 0.9, "recall": 0.85,
      "f1": 0.87, "n_slices": 1200, "n_undefined": 4, "n_surface": 1, "n_volumes": 1}]
)  # fmt: skip
PROTOCOL = {"dice": "soft", "nsd_tolerance_pixels": 1, "stacked": True, "stack_seed": 0}


@pytest.fixture
def compare(tables):
    def make(**changes) -> pd.DataFrame:
        arguments = {
            "by_class": tables.by_class, "intervals": tables.intervals, "paper_metrics": PAPER, "protocol": PROTOCOL,
            "published": PUBLISHED, "baselines": BASELINES, "manifest": tables.manifest,
        }  # fmt: skip
        return report.comparison_table(**(arguments | changes))

    return make


def test_every_source_stands_in_one_table_marked_by_its_protocol(compare):
    table = compare()
    assert table["class"].drop_duplicates().tolist() == ["vertebrae", "canal", "IVD", MEAN_FOREGROUND, "background"]
    canal = table[table["class"] == "canal"].reset_index(drop=True)
    shown = ["mark", "source", "dice", "asd", "asd_unit", "nsd", "nsd_tolerance"]
    assert canal[shown].to_numpy(object)[:4].tolist() == [
        ["", "lumbarflow", 0.75, 1.5, "mm", 0.25, "1 mm"],
        ["", "lumbarflow", 0.76, 1.5, "mm", 0.25, "1 mm"],
        ["†", "lumbarflow", 0.88, 0.4, "pixels", 0.9, "1 px"],
        ["†", "Ahmed et al. 2024", 0.9671, 0.0361, "pixels", 0.9963, "1 px"],
    ]
    assert canal["unit"].tolist()[:4] == ["pooled", "case mean", "paper's protocol", "paper's protocol"]
    assert canal["n"].tolist() == ["1 cases", "1 cases", "1,196 slices", "", ""]
    np.testing.assert_equal(
        canal[["iou", "precision", "recall", "f1"]].to_numpy().tolist(),
        [
            [0.5, 0.6, 0.7, 0.75],
            [0.5, 0.6, 0.7, 0.76],
            [0.8, 0.9, 0.85, 0.87],
            [0.9501, 0.9761, 0.9727, 0.9744],
            [np.nan] * 4,
        ],
    )
    assert canal["caveat"].tolist()[:4] == [
        "",
        "",
        "soft Dice on 128 x 96 pixels, surfaces of one stack of all slices",
        "soft Dice",
    ]
    assert canal["data"].tolist()[:4] == ["t2, test patients: 1"] * 3 + ["T2 SPACE"]
    assert canal["split"].tolist() == ["by patient"] * 3 + ["by slice", "official"]
    nnunet = canal.loc[4]
    assert (nnunet["mark"], nnunet["source"]) == ("‡", "nnU-Net (van der Graaf 2024)")
    assert (nnunet["dice_sd"], nnunet["asd"], nnunet["asd_sd"], nnunet["asd_unit"]) == (0.03, 0.37, 0.22, "mm")
    assert nnunet["caveat"] == "other test patients"


def test_every_dice_of_ours_tells_what_it_is_over(compare, tables):
    overlap = {"background": 6, "vertebrae": 5, "canal": 4, "IVD": 5, MEAN_FOREGROUND: 14}
    missed = {"background": 0, "vertebrae": 0, "canal": 2, "IVD": 1, MEAN_FOREGROUND: 3}
    counts = {"n_cases": 6} | {
        name: tables.by_class["class"].map(values)
        for name, values in (("n_overlap", overlap), ("n_missing_prediction", missed))
    }
    table = compare(by_class=tables.by_class.assign(**counts), paper_metrics=pd.DataFrame(), published=[], baselines=[])
    pooled, of_cases = (rows.set_index("class") for _, rows in table.groupby("unit", sort=False))
    assert pooled["n"].tolist() == ["6 cases"] * 5
    assert of_cases["n"].to_dict() == {
        "vertebrae": "5 cases", "canal": "4 cases", "IVD": "5 cases", MEAN_FOREGROUND: "4 to 5 cases",
        "background": "6 cases",
    }  # fmt: skip
    for rows in (pooled, of_cases):
        assert rows["caveat"].tolist() == [
            "",
            "structures missed altogether, so without ASD: 2",
            "structures missed altogether, so without ASD: 1",
            "structures missed altogether, so without ASD: 3",
            "",
        ]


def test_an_interval_belongs_to_the_mean_over_cases_unless_it_names_another_scope(compare, tables):
    rows = compare().query("`class` == 'canal'")
    np.testing.assert_equal(rows["dice_low"].tolist(), [np.nan, 0.7, np.nan, np.nan, np.nan])
    np.testing.assert_equal(rows["dice_high"].tolist(), [np.nan, 0.81, np.nan, np.nan, np.nan])
    rows = compare(intervals=tables.intervals.assign(scope="pooled")).query("`class` == 'canal'")
    np.testing.assert_equal(rows["dice_low"].tolist(), [0.7, np.nan, np.nan, np.nan, np.nan])


def test_what_a_source_does_not_give_is_missing_not_zero(compare):
    row = compare().query("source == 'SPINEPS (Möller 2024)'").iloc[0]
    assert row[["dice_sd", "asd", "iou", "nsd"]].isna().all()
    assert (row["asd_unit"], row["data"], row["caveat"]) == ("", "", "instances, not classes")


def test_our_own_leaky_or_synthetic_figures_are_marked(compare, tables):
    manifest = tables.manifest | {
        "leaky": True,
        "split_method": "slice",
        "data_kind": "synthetic",
        "settings": {"split": {"method": "slice", "validation_is_test": True}},
    }
    ours = compare(manifest=manifest).query("source == 'lumbarflow' and `class` == 'canal'")
    assert ours["mark"].tolist() == ["§", "§", "†§"]
    assert ours["split"].unique().tolist() == ["by slice"]
    assert ours["caveat"].str.startswith("synthetic scans; the epoch was chosen on the slices that are scored").all()


def test_a_protocol_that_was_changed_says_so(compare):
    changed = PROTOCOL | {"dice": "hard", "nsd_tolerance_pixels": 2, "stacked": False}
    table = compare(protocol=changed, paper_metrics=PAPER.assign(n_surface=1100, n_volumes=1200))
    row = table[(table["mark"] == "†") & (table["source"] == "lumbarflow")].iloc[0]
    assert row["caveat"] == (
        "hard Dice on 128 x 96 pixels, surfaces of each slice by itself; "
        "ASD of 1,100 of 1,200 volumes, the others lack the class"
    )
    assert row["nsd_tolerance"] == "2 px"


def test_ours_are_compared_without_the_papers_protocol_too(compare):
    table = compare(paper_metrics=pd.DataFrame(), protocol={}, published=[], baselines=[])
    assert table["mark"].unique().tolist() == [""]
    assert len(table) == 10


def test_a_published_row_of_no_class_is_refused(compare):
    with pytest.raises(ValueError, match=r"rows to compare are of the classes \['disc'\]; expected names from"):
        compare(published=[PUBLISHED[0] | {"class": "disc"}])


def test_the_comparison_explains_the_marks_it_uses_and_mutes_their_rows(compare, tables):
    section = report.comparison_section(compare(), PNG)
    assert "† the paper's protocol" in words(section)
    assert "ASD and NSD are over one stack of all slices; Dice alone is averaged over slices" in words(section)
    assert report.F1_NOTE in words(section)
    assert "‡ published elsewhere" in words(section)
    assert "§" not in words(section)
    assert "Rows without a mark are ours" in words(section)
    table = section.blocks[-1]
    assert list(table.muted) == (table.frame["mark"] != "").tolist()
    assert list(table.frame.columns[:2]) == ["class", "mark"]
    leaky = report.comparison_section(compare(manifest=tables.manifest | {"leaky": True}), PNG)
    assert "§ ours, split by slice" in words(leaky)
    assert "Rows without a mark" not in words(leaky)
    alone = report.comparison_section(compare(paper_metrics=pd.DataFrame(), published=[]), PNG)
    assert report.F1_NOTE not in words(alone)


def test_training_names_its_best_epoch_and_its_end():
    history = pd.DataFrame(
        {
            "epoch": [1, 2, 3], "loss": [0.5, 0.4, 0.3], "val_loss": [0.6, 0.5, 0.55], "val_mean_iou": [0.2, 0.61, 0.6],
            "learning_rate": [1e-3, 5e-4, 1e-5], "seconds": [70.0, 60.0, 50.0], "slices_per_second": [4.0, 5.0, 5.0],
        }
    )  # fmt: skip
    section = report.training_section(history, {"best_epoch": 2, "stopped_by": "patience"}, PNG)
    assert words(section).startswith("3 epochs in 3.0 minutes; ended by `patience`.")
    assert words(section).endswith("the weights of epoch 2, whose validation mean IoU is 0.610.")
    assert Page(to_html("T", [section])).tables[0][3][4] == "1.00e-05"


def test_the_confusion_matrix_reads_references_down_and_predictions_across():
    counts = np.arange(16).reshape(4, 4).tolist()
    section = report.confusion_section({"classes": list(CLASSES), "counts": counts}, PNG)
    frame = frames(section)[0].set_index("reference")
    assert frame.loc["vertebrae", "predicted canal"] == 6


def test_reliability_is_shown_with_the_calibration_error_of_each_structure():
    counts = np.zeros((3, 10, 3))
    counts[0, 9], counts[0, 5] = (30, 28.5, 30), (10, 5.5, 3)  # apart by 0.05 on 30 pixels, by 0.25 on 10
    section = report.reliability_section(reliability_table(counts), PNG)
    errors = frames(section)[0].set_index("class")["calibration_error"]
    assert errors["vertebrae"] == pytest.approx(0.1) and errors[["canal", "IVD"]].isna().all()
    assert "reliability.png" in to_markdown("T", [section])


def test_every_case_is_listed_and_undefined_ones_are_counted():
    by_case = pd.DataFrame(
        [
            {"series": series, "patient": series[0], "class": name, "dice": np.nan if name == "canal" else 0.5}
            for series in ("1_t1", "1_t2", "2_t2")
            for name in CLASSES
        ]
    )
    section = report.cases_section(by_case, PNG)
    assert "3 cases of 2 patients. 3 of 9 pairs" in words(section)
    assert len(frames(section)[0]) == 9


def test_pages_of_cases_are_linked_and_without_any_the_command_is_told():
    section = report.viewer_section(["1_t1", 'a b"<'])
    page = Page(to_html("T", [section]))
    assert page.attributes("href")[1:] == ["viewer/1_t1.html", "viewer/a%20b%22%3C.html"]
    assert 'a b"<' in page.words
    assert r'- [a b"\<](viewer/a%20b%22%3C.html)' in to_markdown("T", [section])
    assert "`kedro run --pipeline=viewer`" in words(report.viewer_section([]))


def test_overlays_name_the_cases_that_they_show():
    chosen = pd.DataFrame(
        [("best", "1_t1", 7, 0.95), ("worst", HOSTILE, 3, 0.5)], columns=["case", "series", "slice", "dice"]
    )
    section = report.overlays_section(chosen, PNG)
    assert frames(section)[0] is chosen
    image = next(attributes for tag, attributes in Page(to_html("T", [section])).tags if tag == "img")
    assert f"best: 1_t1, slice 7; worst: {HOSTILE}, slice 3." in image["alt"]


def test_the_ceiling_stands_beside_what_the_model_reached(tables):
    section = report.ceiling_section(tables.by_class, tables.manifest)
    assert "128 x 96 pixels" in words(section)
    assert "of the scored slices alone" in words(section)
    frame = frames(section)[0].set_index("class")
    assert frame.loc["canal", ["dice", "model_dice"]].tolist() == [0.84, 0.75]


def test_hardware_and_run_times():
    record = {"hardware": {"processor": "EPYC", "cores": 2, "gpus": []}}
    hardware, times = frames(report.hardware_section(record, pd.DataFrame({"step": ["fit"], "seconds": [12.34]})))
    assert hardware.to_numpy().tolist() == [["processor", "EPYC"], ["cores", "2"], ["gpus", "[]"]]
    assert times["seconds"].tolist() == [12.34]
    assert "No run times were recorded." in words(report.hardware_section(record, pd.DataFrame()))


@pytest.mark.parametrize(
    ("build", "pipeline"),
    [
        (report.leakage_section, "leakage"),
        (lambda table, **more: report.baselines_section(table, table, **more), "baselines"),
        (lambda table, **more: report.external_section(table, table, **more), "evaluate_external"),
        (report.apta_section, "apta_audit"),
    ],
)  # fmt: skip
def test_what_was_not_run_names_its_command(build, pipeline):
    table = pd.DataFrame(columns=["class"])
    section = build(table)
    assert words(section).startswith(f"Not part of this run. `kedro run --pipeline={pipeline}`, with the `--env`")
    assert "`kedro run --env=paper`" in words(build(table, command="kedro run --env=paper"))
    row = {"scope": "pooled", "class": "IVD", "metric": "iou", "difference": 0.01, "dice": 0.5, "p_smallest": np.nan}
    full = build(pd.DataFrame([row]))
    assert {len(frame) for frame in frames(full)} == {1}
    other = words(build(None))
    assert other.startswith("Left out: what is there was made from other data, or does not say.")
    assert f"`kedro run --pipeline={pipeline}`" in other
    assert "Not part of this run" not in words(full)


@pytest.fixture
def leakage() -> pd.DataFrame:
    """The difference rounds to 0.008, though 0.926 - 0.919 is 0.007."""
    shared = {"metric": "dice", "slice_n": 1120, "patient_n": 118, "epochs": 20}
    figures = {
        ("slice mean", MEAN_FOREGROUND): (0.7, 0.6, np.nan, np.nan, np.nan, np.nan),
        ("pooled", "IVD"): (0.9, 0.8, 0.85, 0.95, 0.7, 0.9),
        ("pooled", MEAN_FOREGROUND): (0.9264, 0.9186, 0.9218, 0.9311, 0.9049, 0.9288),
    }
    names = ["slice_split", "patient_split", "slice_low", "slice_high", "patient_low", "patient_high"]
    table = pd.DataFrame(
        {"scope": scope, "class": name} | shared | dict(zip(names, values, strict=True))
        for (scope, name), values in figures.items()
    )
    return table.assign(difference=table["slice_split"] - table["patient_split"])


def test_the_leak_is_said_in_a_sentence(leakage):
    section = report.leakage_section(leakage)
    assert words(section).endswith(
        "Splitting by slice adds 0.008 to the pooled mean foreground Dice (0.926 against 0.919, 95 % intervals 0.922 "
        "to 0.931 and 0.905 to 0.929). Both nets had the same budget of 20 epochs. It is one seed, the test "
        "slices differ (1,120 of the split by slice, 118 of that by patient), and the split by slice trains on slices "
        "of nearly all patients."
    )
    assert frames(section)[0] is leakage


def test_a_leak_may_be_negative_or_without_intervals(leakage):
    text = words(report.leakage_section(leakage.assign(difference=-0.0042, patient_low=np.nan)))
    assert "takes 0.004 from the pooled mean foreground Dice (0.926 against 0.919). Both" in text


@pytest.mark.parametrize("changed", [{"metric": "iou"}, {"difference": np.nan}])
def test_without_a_dice_the_leak_is_a_table_alone(leakage, changed):
    section = report.leakage_section(leakage.assign(**changed))
    assert "Splitting by slice" not in words(section)
    assert len(frames(section)[0]) == 3


def test_baselines_bring_their_tests_with_probabilities_in_two_digits():
    tests = pd.DataFrame(
        {
            "model": ["atlas", "unet"], "n_patients": [5, 6], "p": [0.00042, 0.5], "p_holm": [0.0001234, 1.0],
            "p_smallest": [0.0625, 0.03125],
        }
    )  # fmt: skip
    table = pd.DataFrame({"model": ["atlas"], "epochs": [1], "precision": ["float32"], "dice": [0.5]})
    section = report.baselines_section(table, tests)
    shown = Page(to_html("T", [section])).tables
    assert shown[1][1] == ["atlas", "5", "0.00042", "0.00012", "0.062"]
    assert shown[0][1] == ["atlas", "1", "float32", "0.500"]
    assert "the paper's net as well, which is not the model of the rest of this report" in words(section)
    assert "With 6 patients, no p can fall below 0.031, even before Holm's correction." in words(section)
    alone = report.baselines_section(table, pd.DataFrame())
    assert "no p can fall" not in words(alone)
    assert len(frames(alone)) == 1


def test_external_masks_that_were_not_scored_are_listed():
    scored = pd.DataFrame({"class": ["IVD"], "dice": [0.5]})
    lacking = {"series": "2_t2", "file": "", "outcome": "missing", "found": "no mask"}
    left_out = pd.DataFrame([lacking | {"expected": "one volume named like the image", "what_to_do": "Add it."}])
    section = report.external_section(scored, left_out)
    assert [frame["series" if "series" in frame else "class"].tolist() for frame in frames(section)] == [
        ["IVD"],
        ["2_t2"],
    ]
    assert section.blocks[-1].caption == "Series that were not scored."
    assert len(frames(report.external_section(scored, left_out.iloc[:0]))) == 1


def test_provenance_shows_what_the_model_and_its_figures_were_made_with(tables):
    record = {
        "git_commit": "abc",
        "git_changed": "true",
        "settings": {
            "model": {"name": "unet"}, "loss": {}, "training": {"seed": 20240, "max_minutes": None},
            "augmentation": {"enabled": False},
        },
        "hardware": {"processor": "EPYC"},
    }  # fmt: skip
    evaluation = {
        "git_commit": "def", "git_changed": "false", "evaluation": {"batch_size": 4},
        "paper_protocol": {"dice": "soft"},
    }  # fmt: skip
    section = report.provenance_section(tables.manifest, record, evaluation)
    sources, parameters = frames(section)
    assert sources.to_numpy().tolist() == [
        ["trained_at_git_commit", "abc, with uncommitted changes"], ["evaluated_at_git_commit", "def"],
        ["data_kind", "real"], ["data_hash", "d0"], ["split_hash", "d1"], ["content_hash", "d2"],
    ]  # fmt: skip
    assert parameters.to_numpy().tolist() == [
        ["preprocess.size", "[128, 96]"], ["split.method", "patient"], ["split.validation_is_test", "false"],
        ["model.name", "unet"], ["loss", "{}"], ["training.seed", "20240"], ["training.max_minutes", "null"],
        ["augmentation.enabled", "false"], ["evaluation.batch_size", "4"], ["paper_protocol.dice", "soft"],
    ]  # fmt: skip
    assert report.SPIDER_CITATION in words(section)
    assert "not a medical device" in words(section)
    assert "https://arxiv.org/abs/2409.06018" in Page(to_html("T", [section])).attributes("href")


def test_provenance_says_what_older_records_do_not(tables):
    section = report.provenance_section(tables.manifest | {"data_kind": "synthetic"}, {"weights": "w"}, {})
    sources, parameters = (dict(frame.to_numpy().tolist()) for frame in frames(section))
    assert (sources["trained_at_git_commit"], sources["evaluated_at_git_commit"]) == ("not recorded", "not recorded")
    lacking = [name for name, value in parameters.items() if value == "not recorded"]
    assert lacking == ["model", "loss", "training", "augmentation", "evaluation", "paper_protocol"]
    assert report.SPIDER_CITATION not in words(section)
