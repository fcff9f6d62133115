"""Scans are found once each and named alike whatever the order of a folder, and a bad one is told, never segmented."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumbarflow import scans
from lumbarflow.imaging import SAGITTAL_AXES, VOLUME_SUFFIXES, VolumeError, write_volume
from lumbarflow.scans import DICOM, LIMITS, ScanSource, find_scans, read_scan, scan_at

# Index x runs from anterior to posterior, y from superior to inferior, z from the patient's left to the right.
SAGITTAL = SAGITTAL_AXES.T[:, ::-1]


@pytest.fixture
def sagittal(make_volume):
    """Factory of a usual scan: 6 sagittal slices 4 mm apart, of 9 x 7 pixels."""

    def make(shape=(6, 9, 7), **what):
        return make_volume(shape, **{"direction": SAGITTAL, "spacing_mm": (0.7, 0.8, 4.0)} | what)

    return make


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    return folder


@pytest.fixture
def outside(tmp_path, sagittal):
    """A folder beside the scans, with a volume in it."""
    write_volume(sagittal(), tmp_path / "outside/1_t2.mha")
    return tmp_path / "outside"


def names(found):
    return [source.name for source in found]


# --- finding ----------------------------------------------------------------------------------------------------------


def test_every_volume_below_the_folder_is_found_under_its_path(root, sagittal):
    for name in ("b.nrrd", "a/1_t2.NII.GZ", "a/deep/er/2.t1.mha", "c.mhd", "c/3.nii"):
        path = root / name
        write_volume(sagittal(), path.with_name(path.name.lower()))
        path.with_name(path.name.lower()).rename(path)
    found = find_scans(root)
    assert [(source.name, source.format, source.suffix) for source in found] == [
        ("a/1_t2", ".nii.gz", ".nii.gz"),
        ("a/deep/er/2.t1", ".mha", ".mha"),
        ("b", ".nrrd", ".nrrd"),
        ("c", ".mhd", ".mhd"),
        ("c/3", ".nii", ".nii"),
    ]
    assert [source.path for source in found][0] == root / "a/1_t2.NII.GZ"
    assert all(source.problem is None and source.series is None for source in found)
    assert found.passed_over == {}  # c.zraw is part of c.mhd


def test_the_data_file_of_a_header_is_known_by_the_header(root, sagittal):
    write_volume(sagittal(), root / "1_t2.mhd")
    (root / "1_t2.zraw").rename(root / "voxels")
    header = (root / "1_t2.mhd").read_text()
    (root / "1_t2.mhd").write_text(header.replace("1_t2.zraw", "voxels"))
    (root / "stray.zraw").write_bytes(b"?")
    found = find_scans(root)
    assert names(found) == ["1_t2"] and found.passed_over == {scans.OTHER: 1}
    assert np.array_equal(read_scan(found[0]).volume.array, sagittal().array)


def test_dicom_series_are_named_by_folder_and_place(root, make_dicom, sagittal):
    make_dicom(root, sagittal(), series=7)
    for number in (3, 5):
        for path in make_dicom(root / f"{number}", sagittal(), series=number):
            (root / "clinic/exam").mkdir(parents=True, exist_ok=True)
            path.rename(root / f"clinic/exam/{8 - number}.{path.stem}")  # no suffix, and the fifth comes first
        (root / f"{number}").rmdir()
    found = find_scans(root)
    assert [(source.name, source.path) for source in found] == [
        ("clinic/exam_1", root / "clinic/exam"), ("clinic/exam_2", root / "clinic/exam"), ("scans_1", root),
    ]  # fmt: skip
    assert {source.format for source in found} == {DICOM} and {source.suffix for source in found} == {".nii.gz"}
    assert [source.series.files[0].name for source in found] == ["3.IM0001", "5.IM0001", "IM0001.dcm"]
    assert [len(source.series.files) for source in found] == [6, 6, 6]


def test_a_volume_is_never_taken_for_dicom(root, make_dicom, sagittal):
    (path, *_) = make_dicom(root, sagittal())
    path.rename(root / "odd.nii")
    found = find_scans(root)
    assert [(source.name, source.format) for source in found] == [("odd", ".nii"), ("scans_1", DICOM)]
    with pytest.raises(VolumeError, match=r"odd.nii: no NIfTI-1 header"):
        read_scan(found[0])


def test_what_is_no_scan_is_counted(root, make_dicom, sagittal):
    write_volume(sagittal(), root / "1_t2.mha")
    write_volume(sagittal(), root / ".trash/2_t2.mha")
    for name in (".hidden.mha", "notes.txt", "report", "sub/table.csv", "sub/deeper/preview.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("words")
    os.mkfifo(root / "pipe")  # to open it would wait forever
    os.mkfifo(root / "pipe.dcm")
    found = find_scans(root)
    assert names(found) == ["1_t2"]
    assert found.passed_over == {scans.HIDDEN: 2, scans.OTHER: 6}


def test_the_folder_of_outputs_is_left_out(root, sagittal):
    for name in ("1_t2", "out/1_t2_seg", "out/sub/2_t2_seg", "outer/3_t2"):
        write_volume(sagittal(), root / f"{name}.mha")
    (root / "more").symlink_to(root / "out/sub")
    assert names(find_scans(root, root / "out")) == ["1_t2", "outer/3_t2"]
    assert len(find_scans(root, root)) == len(find_scans(root, root.parent)) == len(find_scans(root)) == 4


def test_scans_that_would_share_a_name_are_told_apart(root, make_dicom, sagittal):
    for name in ("1_t2.mha", "1_t2.nii.gz", "1_t2.nii", "1_t2_nii.mha", "2_t2.mha", "clinic_1.mha"):
        write_volume(sagittal(), root / name)
    shutil.copy(root / "2_t2.mha", root / "2_t2.MHA")
    make_dicom(root / "clinic", sagittal())
    found = {source.name: source.path.name for source in find_scans(root)}
    assert found == {
        "1_t2_mha": "1_t2.mha",
        "1_t2_nii": "1_t2_nii.mha",  # its own name
        "1_t2_nii_2": "1_t2.nii",
        "1_t2_nii_gz": "1_t2.nii.gz",
        "2_t2_mha": "2_t2.MHA",
        "2_t2_mha_2": "2_t2.mha",
        "clinic_1_dicom": "clinic",
        "clinic_1_mha": "clinic_1.mha",
    }


STEMS = st.sampled_from(["a", "b", "a_mha", "a_nii_gz", "a_mha_2"])
FILES = st.sets(st.tuples(st.sampled_from(["", "a/", "b/a/"]), STEMS, st.sampled_from([*VOLUME_SUFFIXES, ".MHA"])))


@given(FILES.filter(len), st.randoms(use_true_random=False))
def test_names_are_unique_whatever_the_order_of_the_folder(tmp_path_factory, files, random):
    root = tmp_path_factory.mktemp("scans")
    for parts in sorted(files):
        (root / "".join(parts)).parent.mkdir(parents=True, exist_ok=True)
        (root / "".join(parts)).touch()
    found = find_scans(root)
    assert len(set(names(found))) == len(found) == len(files)
    assert names(found) == sorted(names(found))
    assert {source.path for source in found} == {root / "".join(parts) for parts in files}

    scandir = os.scandir

    def shuffled(folder):
        with scandir(folder) as entries:
            entries = list(entries)
        random.shuffle(entries)
        return nullcontext(entries)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", shuffled)
        again = find_scans(root)
    assert [(source.name, source.path) for source in again] == [(source.name, source.path) for source in found]


@given(
    st.lists(st.tuples(STEMS, st.sampled_from([*VOLUME_SUFFIXES, DICOM]), st.integers(0, 2)), unique=True), st.data()
)
def test_unique_names_do_not_depend_on_who_comes_first(parts, data):
    sources = [ScanSource(name, Path(f"{number}/{name}{format}"), format) for name, format, number in parts]
    named = scans._uniquely_named(data.draw(st.permutations(sources)))
    assert named == scans._uniquely_named(sources)
    assert len(set(names(named))) == len(sources)


@pytest.mark.parametrize(
    "name, message",
    [
        ("none", "none: no such folder; expected a folder of scans. Name the folder"),
        ("1_t2.mha", "1_t2.mha: a file; expected a folder of scans. Name the folder"),
    ],
)
def test_what_is_no_folder_is_an_error(outside, name, message):
    with pytest.raises(VolumeError, match=message):
        find_scans(outside / name)


def test_a_folder_without_scans_is_an_error(root):
    with pytest.raises(VolumeError, match=r"scans: no scans \(nothing below it\); expected volumes \(.mha .*\) or"):
        find_scans(root)
    for name in (".hidden", "a.txt", "b.txt"):
        (root / name).write_text("words")
    (root / "sub").mkdir()
    with pytest.raises(
        VolumeError, match=r"no scans \(1 hidden, 2 neither volumes nor DICOM images below it\).*Name the folder"
    ):
        find_scans(root)


# --- links ------------------------------------------------------------------------------------------------------------


def test_links_that_stay_inside_are_followed_once(root, make_dicom, sagittal):
    write_volume(sagittal(), root / "a/1_t2.mha")
    write_volume(sagittal(), root / ".store/2_t2.mha")
    (root / "link.mha").symlink_to("a/1_t2.mha")
    (root / "again").symlink_to("a")  # the same folder is there already
    (root / "kept").symlink_to(".store")
    (root / "later").symlink_to(root / ".store")
    make_dicom(root / ".store/dicom", sagittal())
    (root / "series").mkdir()
    for path in sorted((root / ".store/dicom").iterdir()):
        (root / "series" / path.stem).symlink_to(path)
    found = find_scans(root)
    assert names(found) == ["a/1_t2", "kept/2_t2", "kept/dicom_1", "link", "series_1"]
    assert all(source.problem is None for source in found)
    for source in found:
        assert read_scan(source).volume.size == (7, 9, 6)


def test_links_in_a_circle_end(root, sagittal):
    write_volume(sagittal(), root / "a/b/1_t2.mha")
    (root / "a/b/up").symlink_to(root)
    (root / "a/self").symlink_to(".")
    (root / "ring.mha").symlink_to("gnir.mha")
    (root / "gnir.mha").symlink_to("ring.mha")
    (root / "circle").symlink_to("elcric")
    (root / "elcric").symlink_to("circle")
    found = find_scans(root)
    assert names(found) == ["a/b/1_t2", "gnir", "ring"]
    assert found[2].problem is not None  # so that nobody else looks for the file either
    with pytest.raises(VolumeError, match=r"ring.mha: no such file; expected an existing file"):
        read_scan(found[2])


def test_a_root_that_is_a_link_is_no_trouble(root, sagittal, tmp_path):
    write_volume(sagittal(), root / "1_t2.mha")
    (tmp_path / "link").symlink_to(root)
    (source,) = find_scans(tmp_path / "link")
    assert source.path == tmp_path / "link/1_t2.mha" and source.problem is None


@pytest.mark.parametrize("way", ["file", "chain", "folder", "nothing"])
def test_links_that_lead_out_are_found_but_not_opened(root, outside, sagittal, way):
    write_volume(sagittal(), root / "2_t2.mha")
    name = "1_t2"
    if way == "folder":
        (root / "1_t2").symlink_to(outside)
    else:
        (root / "1_t2.mha").symlink_to(outside / ("1_t2.mha" if way != "nothing" else "none.mha"))
    if way == "chain":
        (root / "0_t2.mha").symlink_to("1_t2.mha")
        name = "0_t2"
    found = {source.name: source for source in find_scans(root)}
    assert set(found) == {"1_t2", "2_t2", name} and found["2_t2"].problem is None
    with pytest.raises(
        VolumeError,
        match=rf"{name}\S*: a link that leads out of the folder of scans; expected a file inside that folder. Copy",
    ):
        read_scan(found[name])


def test_a_sibling_whose_name_begins_alike_is_outside(root, sagittal, tmp_path):
    write_volume(sagittal(), tmp_path / "scans2/1_t2.mha")
    (root / "1_t2.mha").symlink_to(tmp_path / "scans2/1_t2.mha")
    assert "leads out" in find_scans(root)[0].problem.found


def test_dicom_links_that_lead_out_spoil_the_series_beside_them(root, tmp_path, make_dicom, sagittal):
    files = make_dicom(tmp_path / "outside", sagittal())
    for path in files[:4]:
        shutil.copy(path, root)
    for path in files[4:]:
        (root / path.name).symlink_to(path)
    (root / "notes.txt").symlink_to(tmp_path / "notes.txt")  # nobody misses it
    (source,) = find_scans(root)
    assert (source.name, source.format) == ("scans_1", DICOM)
    with pytest.raises(VolumeError, match=r"IM0005.dcm: a link that leads out of .*, like 1 more beside it; expected"):
        read_scan(source)


def test_a_folder_of_links_that_lead_out_is_one_scan(root, tmp_path, make_dicom, sagittal):
    (root / "exam").mkdir()
    for path in make_dicom(tmp_path / "outside", sagittal()):
        (root / "exam" / path.stem).symlink_to(path)
    (source,) = find_scans(root)
    assert source.name == "exam" and source.series is None
    with pytest.raises(VolumeError, match=r"IM0001: a link that leads out of .*, like 5 more"):
        read_scan(source)


@pytest.mark.parametrize("elsewhere", ["absolute", "../outside/1_t2.zraw", "sub/1_t2.zraw", "link"])
def test_a_header_whose_data_lie_elsewhere_is_not_read(root, outside, sagittal, elsewhere):
    write_volume(sagittal(), root / "1_t2.mhd")
    shutil.copy(root / "1_t2.zraw", outside)
    if elsewhere == "link":
        (root / "1_t2.zraw").unlink()
        (root / "1_t2.zraw").symlink_to(outside / "1_t2.zraw")
        message = r"1_t2.zraw: a link that leads out of the folder of scans; expected a file inside"
    else:
        named = str(outside / "1_t2.zraw") if elsewhere == "absolute" else elsewhere
        header = (root / "1_t2.mhd").read_text()
        (root / "1_t2.mhd").write_text(header.replace("1_t2.zraw", named))
        (root / "1_t2.zraw").unlink()
        message = rf"1_t2.mhd: its ElementDataFile points outside its folder \('{named}'\); expected a data file beside"
    (source,) = find_scans(root)
    with pytest.raises(VolumeError, match=message):
        read_scan(source)


def test_a_folder_that_cannot_be_opened_is_told(root, sagittal, monkeypatch):
    write_volume(sagittal(), root / "a/1_t2.mha")
    write_volume(sagittal(), root / "b/2_t2.mha")
    scandir = os.scandir

    def locked(folder):
        if folder == root / "b":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", locked)
    found = find_scans(root)
    assert names(found) == ["a/1_t2", "b"]
    with pytest.raises(VolumeError, match=r"b: it cannot be opened \(Permission denied\); expected a readable folder"):
        read_scan(found[1])


def test_dicom_files_that_are_none_spoil_the_series_beside_them(root, make_dicom, sagittal):
    *_, path, last = make_dicom(root, sagittal())
    path.write_bytes(b"")
    last.rename(root / "IM0006.IMA").write_bytes(b"?" * 1000)
    (root / "notes.txt").write_bytes(b"")
    (source,) = find_scans(root)
    assert source.name == "scans_1"
    with pytest.raises(VolumeError, match=r"IM0005.dcm: no DICOM or not readable, like 1 more beside it; expected"):
        read_scan(source)


def test_a_file_that_may_not_be_looked_at_spoils_the_series_beside_it(root, make_dicom, sagittal, monkeypatch):
    path = make_dicom(root, sagittal())[-1].rename(root / "IM6")
    path.write_bytes(b"")  # as good as locked: tests may run as root, who can read all
    assert find_scans(root)[0].problem is None
    monkeypatch.setattr(os, "access", lambda file, mode: file != path)
    with pytest.raises(VolumeError, match="IM6: no DICOM or not readable; expected a complete DICOM file. Copy it"):
        read_scan(find_scans(root)[0])


# --- one that somebody names ------------------------------------------------------------------------------------------


def test_a_volume_that_somebody_names(outside, tmp_path):
    path = outside / "1_t2.mha"
    assert scan_at(path) == scan_at(str(path)) == ScanSource("1_t2", path, ".mha")
    (tmp_path / "link.MHA").symlink_to(path)
    assert scan_at(tmp_path / "link.MHA") == ScanSource("link", tmp_path / "link.MHA", ".mha")


def test_a_series_that_somebody_names(root, make_dicom, sagittal, tmp_path):
    files = make_dicom(root, sagittal())
    (root / "notes.txt").touch()
    for name in ("odd.nii", ".hidden"):
        shutil.copy(files[0], root / name)
    (root / "sub").mkdir()
    source = scan_at(root)
    assert (source.name, source.path, source.format, source.series.files) == ("scans_1", root, DICOM, tuple(files))


def test_a_folder_of_no_series_or_several_is_an_error(root, make_dicom, sagittal):
    (root / "notes.txt").touch()
    with pytest.raises(VolumeError, match=r"scans: no DICOM series \(1 other files\); expected the files of exactly"):
        scan_at(root)
    for number in (1, 2):
        for path in make_dicom(root / "sub", sagittal(), series=number):
            path.rename(root / f"{number}_{path.name}")
    with pytest.raises(VolumeError, match=r"scans: 2 DICOM series; expected .* exactly one. Put each into a folder"):
        scan_at(root)
    (root / "2_IM0001.dcm").write_bytes(b"")
    with pytest.raises(VolumeError, match=r"2_IM0001.dcm: no DICOM or not readable; expected"):
        scan_at(root)


@pytest.mark.parametrize(
    "name, message",
    [
        ("none.mha", "none.mha: no such file; expected an existing file"),
        ("none", "none: no such file; expected an existing file"),
        ("a.png", r"a.png: a file whose name ends in '.png'; expected .mha .*, or the folder of a DICOM series"),
    ],
)
def test_what_somebody_names_must_be_a_scan(root, name, message):
    (root / "a.png").touch()
    with pytest.raises(VolumeError, match=message):
        scan_at(root / name)


@pytest.mark.parametrize("what", ["file", "header", "folder", "series"])
def test_what_somebody_names_may_be_kept_within_a_folder(root, tmp_path, make_dicom, sagittal, what):
    write_volume(sagittal(), tmp_path / "outside/1_t2.mhd")
    files = make_dicom(tmp_path / "outside/exam", sagittal())
    path = root / {"file": "1_t2.mhd", "header": "1_t2.mhd", "folder": "exam", "series": "exam"}[what]
    if what == "header":
        shutil.copy(tmp_path / "outside/1_t2.mhd", root)
        (root / "1_t2.zraw").symlink_to(tmp_path / "outside/1_t2.zraw")
    elif what == "series":
        path.mkdir()
        for file in files:
            (path / file.name).symlink_to(file)
    else:
        path.symlink_to(tmp_path / "outside" / path.name)
        if what == "file":
            (root / "1_t2.zraw").symlink_to(tmp_path / "outside/1_t2.zraw")
    assert read_scan(scan_at(path)).volume.size == (7, 9, 6)
    with pytest.raises(VolumeError, match="a link that leads out of the folder of scans"):
        scan_at(path, within=root)
    assert scan_at(path, within=tmp_path) == scan_at(path)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
def test_a_usual_scan_is_read_as_it_is(root, sagittal, suffix):
    write_volume(sagittal(), root / f"1_t2{suffix}")
    image = read_scan(find_scans(root)[0])
    assert np.array_equal(image.volume.array, sagittal().array)
    np.testing.assert_allclose(image.volume.direction, SAGITTAL, atol=1e-6)
    assert (image.modality, image.dicom, image.warnings) == (None, None, ())


@pytest.mark.parametrize("enhanced", [False, True])
def test_a_usual_series_is_read_as_it_is(root, make_dicom, sagittal, enhanced):
    make_dicom(root, sagittal(), enhanced=enhanced, shuffled=True)
    image = read_scan(find_scans(root)[0])
    assert np.array_equal(image.volume.array, sagittal().array)
    assert (image.modality, image.warnings) == ("MR", ())
    assert image.dicom.volume is image.volume and len(image.dicom.frames) == 6


def source_of(volume, path):
    write_volume(volume, path)
    return scan_at(path)


@pytest.mark.parametrize(
    "values, message",
    [
        (np.full((6, 9, 7), 7), "1_t2.mha: the constant value 7.0; expected an image with contrast. Export"),
        (np.where(np.arange(378).reshape(6, 9, 7) < 3, np.nan, 1), "3 voxels that aren't finite; expected finite"),
        (np.where(np.arange(378).reshape(6, 9, 7) < 1, -np.inf, 1), "1 voxels that aren't finite; expected finite"),
    ],
)
def test_intensities_that_hold_no_image_are_errors(tmp_path, sagittal, values, message):
    with pytest.raises(VolumeError, match=message):
        read_scan(source_of(sagittal(values=values, dtype=np.float32), tmp_path / "1_t2.mha"))


def test_a_series_is_checked_like_a_file(root, make_dicom, sagittal):
    make_dicom(root, sagittal(values=np.full((6, 9, 7), 7)))
    with pytest.raises(VolumeError, match="scans: the constant value 7; expected an image with contrast"):
        read_scan(scan_at(root))


@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
@pytest.mark.parametrize("shape", [(1, 9, 7), (6, 1, 7), (6, 9, 1)])
def test_one_slice_is_an_error(tmp_path, sagittal, suffix, shape):
    size = " x ".join(map(str, reversed(shape)))
    with pytest.raises(VolumeError, match=rf"1_t2\S+: a 2-D image \({size} voxels\); expected several slices. Export"):
        read_scan(source_of(sagittal(shape), tmp_path / f"1_t2{suffix}"))


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path, sagittal, monkeypatch):
    source = source_of(sagittal(), tmp_path / "1_t2.mha")

    def locked(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(scans, "read_volume", locked)
    with pytest.raises(VolumeError, match=r"1_t2.mha: it cannot be opened \(Permission denied\); expected a readable"):
        read_scan(source)


# --- warnings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, spacing_mm, warnings",
    [
        ((5, 9, 7), (0.2, 2.0, 8.0), ()),
        ((4, 9, 7), (0.7, 0.8, 4.0), ("4 sagittal slices; expected at least 5",)),
        ((6, 9, 7), (0.7, 0.8, 8.1), ("sagittal slices 8.1 mm apart; expected 0.5 to 8 mm",)),
        ((6, 9, 7), (0.7, 0.7, 0.4), ("sagittal slices 0.4 mm apart; expected 0.5 to 8 mm",)),
        ((6, 9, 7), (0.7, 2.1, 4.0), ("sagittal pixels of 2.1 x 0.7 mm; expected 0.2 to 2 mm",)),
        ((6, 9, 7), (0.19, 0.8, 4.0), ("sagittal pixels of 0.8 x 0.19 mm; expected 0.2 to 2 mm",)),
    ],
)
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_unusual_geometry_is_told_of_the_sagittal_slices(tmp_path, sagittal, shape, spacing_mm, warnings, axes):
    # The same grid with its array axes in another order: index axis 2 - a is array axis a.
    index = [2 - axes[2 - axis] for axis in range(3)]
    volume = sagittal(
        tuple(shape[axis] for axis in axes),
        direction=SAGITTAL[:, index],
        spacing_mm=tuple(spacing_mm[axis] for axis in index),
    )
    assert read_scan(source_of(volume, tmp_path / "1_t2.mha")).warnings == warnings


def test_limits_are_whoever_calls_says(tmp_path, sagittal):
    limits = {"minimum_slices": 7, "slice_spacing_mm": [1.0, 3.5], "pixel_spacing_mm": [0.75, 1.0]}
    assert read_scan(source_of(sagittal(), tmp_path / "1_t2.mha"), limits).warnings == (
        "6 sagittal slices; expected at least 7",
        "sagittal slices 4 mm apart; expected 1 to 3.5 mm",
        "sagittal pixels of 0.8 x 0.7 mm; expected 0.75 to 1 mm",
    )
    assert set(LIMITS) == set(limits)


@pytest.mark.parametrize(
    "spacing_mm, plane",
    [
        ((0.6, 1.2, 0.7), "roughly axial slices, 1.2 mm apart; expected sagittal ones"),
        ((1.2, 0.6, 0.7), "roughly coronal slices, 1.2 mm apart; expected sagittal ones"),
        ((0.6, 1.0, 0.7), None),  # less than 1.5 times 0.7: nearly isotropic
        ((0.6, 1.2, 0.9), None),
        ((0.6, 0.7, 4.0), None),
    ],
)
def test_slices_that_are_not_sagittal_are_told(tmp_path, sagittal, spacing_mm, plane):
    volume = sagittal(spacing_mm=spacing_mm)  # columns, rows, slices of the sagittal array
    assert read_scan(source_of(volume, tmp_path / "1_t2.mha")).warnings == ((plane,) if plane else ())


def ct_like(fraction_of_air, generator):
    """Hounsfield units of an abdomen: air around it, fat, soft tissue and bone."""
    fat, tissue, bone = generator.normal(-100, 15, 250), generator.normal(45, 25, 450), generator.normal(400, 200, 60)
    body = np.concatenate([fat, tissue, bone])
    air = generator.normal(-1000, 5, int(len(body) * fraction_of_air / (1 - fraction_of_air)))
    return np.concatenate([body, air])


def mri_like(generator):
    """Background of a third, and tissues over a wide range of greys."""
    return np.concatenate([generator.rayleigh(20, 400), generator.gamma(3, 200, 800)])


@pytest.mark.parametrize(
    "values, warned",
    [
        (lambda g: ct_like(0.4, g), True),
        (lambda g: ct_like(0.02, g), True),
        (lambda g: np.append(ct_like(0.4, g), np.full(300, -3024.0)), True),  # outside the scanner's circle
        (lambda g: ct_like(0.4, g) + 1024, False),  # shifted above 0, it cannot be told
        (mri_like, False),
        (lambda g: (mri_like(g) - 500) / 400, False),
        (lambda g: mri_like(g) - 1000, False),
        (lambda g: mri_like(g) * 2 - 1000, False),
        (lambda g: mri_like(g) * 8 - 4000, False),
        (lambda g: -mri_like(g) - 1000, False),  # nothing above the air
    ],
)
def test_intensities_like_those_of_ct_are_told(tmp_path, sagittal, values, warned):
    generator = np.random.default_rng(0)
    values = np.resize(generator.permutation(values(generator)), (6, 20, 20))
    for suffix, dtype in ((".nrrd", np.float32), (".nii", np.int16)):
        volume = sagittal(values.shape, values=values, dtype=dtype)
        warnings = read_scan(source_of(volume, tmp_path / f"1_t2{suffix}")).warnings
        if warned or suffix == ".nrrd" or np.ptp(values) > 20:
            assert warnings == (("intensities like those of CT, not of MRI",) if warned else ())


def test_dicom_tells_its_modality_itself(root, make_dicom, sagittal):
    generator = np.random.default_rng(0)
    volume = sagittal(values=np.resize(generator.permutation(ct_like(0.4, generator)), (6, 9, 7)))
    make_dicom(root / "exam", volume)
    write_volume(volume, root / "1_t2.nii")
    assert [len(read_scan(source).warnings) for source in find_scans(root)] == [1, 0]


def test_a_series_without_a_modality_is_looked_at_like_a_file(root, make_dicom, sagittal):
    generator = np.random.default_rng(0)
    volume = sagittal(values=np.resize(generator.permutation(ct_like(0.4, generator)), (6, 9, 7)))
    make_dicom(root / "exam", volume, modality="")
    (source,) = find_scans(root)
    assert read_scan(source).warnings == ("intensities like those of CT, not of MRI",)


def test_what_nobody_foresaw_in_dicom_quotes_no_header(root, make_dicom, sagittal, monkeypatch):
    make_dicom(root / "exam", sagittal())
    (source,) = find_scans(root)

    def fail(series):
        raise ValueError(f"invalid literal: {make_dicom.identifiers[0]}")

    monkeypatch.setattr(scans.dicom, "read_series", fail)
    with pytest.raises(
        VolumeError, match=r"exam: it cannot be read as DICOM \(ValueError\); expected a sound MR"
    ) as caught:
        read_scan(source)
    assert make_dicom.identifiers[0] not in str(caught.value)
    monkeypatch.setattr(scans.dicom, "read_series", lambda series: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        read_scan(source)


def test_masks_made_earlier_are_no_scans(root, sagittal):
    write_volume(sagittal(), root / "1_t2.mha")
    write_volume(sagittal(), root / "masks/1_t2_seg.mha")
    (root / "masks/.predictions").mkdir()
    found = find_scans(root)
    assert names(found) == ["1_t2"] and found.passed_over == {"with the masks of an earlier prediction": 1}
    with pytest.raises(
        VolumeError, match="masks: a folder with the masks of an earlier prediction; expected a folder of"
    ):
        find_scans(root / "masks")


@pytest.mark.parametrize(
    ("name", "called", "found"),
    [
        (b"\xff_t2", r"\xff_t2", "a name that is not UTF-8"),
        (b"x" * 240, "x" * 200, "a name of over 200 bytes"),
        ("é".encode() * 101, "é" * 100, "a name of over 200 bytes"),
    ],
)
def test_names_that_no_output_can_have_are_told(root, sagittal, name, called, found):
    write_volume(sagittal(), root / "1_t2.mha")
    write_volume(sagittal(), root / "2_t2.mha")
    os.rename(root / "2_t2.mha", os.fsencode(root) + b"/" + name + b".mha")
    sources = {source.name: source for source in find_scans(root)}
    assert set(sources) == {"1_t2", called}
    with pytest.raises(VolumeError, match=f"{found}; expected at most 200 bytes of UTF-8, .* Rename it") as caught:
        read_scan(sources[called])
    caught.value.path.encode()


def test_a_folder_that_only_gives_its_names_is_told(root, sagittal, monkeypatch):
    write_volume(sagittal(), root / "1_t2.mha")
    write_volume(sagittal(), root / "locked/2_t2.mha")
    real = os.stat

    def refuse(path, *args, **kwargs):
        if str(path).startswith(f"{root}/locked/"):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refuse)
    sources = {source.name: source for source in find_scans(root)}
    assert set(sources) == {"1_t2", "locked"}
    with pytest.raises(
        VolumeError, match=r"locked: it cannot be opened \(Permission denied\); expected a readable folder"
    ):
        read_scan(sources["locked"])


def test_voxels_behind_a_folder_that_is_a_link_stay_out(root, tmp_path, sagittal):
    # The header itself lies inside in the end; the voxels beside its name do not.
    write_volume(sagittal(), tmp_path / "outside/1_t2.mhd")
    shutil.move(tmp_path / "outside/1_t2.mhd", root / "real.mhd")
    (tmp_path / "outside/1_t2.mhd").symlink_to(root / "real.mhd")
    (root / "sub").symlink_to(tmp_path / "outside")
    with pytest.raises(VolumeError, match=r"1_t2.zraw: a link that leads out"):
        scan_at(root / "sub/1_t2.mhd", within=root)
