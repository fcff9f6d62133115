"""Label maps as DICOM segmentation objects (DICOM-SEG) that refer to the images they were made from.

Unlike everything else that is written, such an object carries the patient's identity: DICOM files it with the study.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lumbarflow import __version__
from lumbarflow.dicom import DicomVolume, quiet_libraries
from lumbarflow.files import write_atomically
from lumbarflow.imaging import LabelMap, VolumeError
from lumbarflow.labels import CANAL_ID, CLASSES, DISC_OFFSET, FOREGROUND, PALETTE, PARTIAL_OFFSET

# What DICOM's objects need of a study, even if empty; anonymised files leave them out.
_IDENTITY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime",
)  # fmt: skip
_NAMES = {"vertebrae": "Vertebrae", "canal": "Vertebral canal", "IVD": "Intervertebral discs"}


def require_highdicom() -> None:
    """Raises ImportError, with what to install, if DICOM-SEG cannot be written here."""
    try:
        import highdicom  # noqa: F401
    except ImportError:
        raise ImportError(
            "DICOM-SEG is written by highdicom, which is not installed. "
            "Run: pip install -c constraints.txt -e '.[dicom]'"
        ) from None


@quiet_libraries()
def write_segmentation(
    labels: LabelMap, source: DicomVolume, path: str | Path, *, model_version: str, numbered: bool
) -> None:
    """Write a label map as a binary DICOM-SEG with a segment for each label that occurs.

    Args:
        labels: on the grid of `source.volume`, in its storage order.
        source: its files are read again for what the object repeats of them.
        path: appears only when it is complete.
        model_version: name and version of the model, up to 64 characters.
        numbered: labels are SPIDER's (vertebrae 1.. from the lowest up, 101.. where cut off, canal 100, discs 201..),
            not the classes 1, 2, 3.
    Raises:
        ImportError: highdicom is not installed.
        ValueError: another grid, no label at all (there is no DICOM-SEG without segments), an unknown label.
        VolumeError: the source's headers lack what DICOM-SEG has to repeat.
    """
    require_highdicom()
    from highdicom import UID
    from highdicom.seg import Segmentation

    if labels.array.shape != source.volume.array.shape:
        raise ValueError(f"labels of shape {labels.array.shape} for a scan of shape {source.volume.array.shape}")
    present = np.unique(labels.array[labels.array != 0])
    if not len(present):
        raise ValueError("a label map without labels; expected at least one: DICOM-SEG has no empty object")
    segments = [
        _segment(number, *_meaning(int(label), numbered), model_version)
        for number, label in enumerate(present, start=1)
    ]
    # Segments are numbered without gaps. highdicom takes the slices in the order of the source's files and frames.
    numbers = np.searchsorted(present, labels.array) + 1
    numbers = np.where(labels.array == 0, 0, numbers).astype(np.uint16)
    if len(source.instances) == 1:
        numbers = numbers[np.argsort(source.frames)]
    try:
        headers = _headers(source)
        segmentation = Segmentation(
            source_images=headers,
            pixel_array=numbers,
            segmentation_type="BINARY",
            segment_descriptions=segments,
            series_instance_uid=UID(),
            series_number=1000 + int(headers[0].get("SeriesNumber") or 0),
            sop_instance_uid=UID(),
            instance_number=1,
            manufacturer="lumbarflow",
            manufacturer_model_name="lumbarflow",
            software_versions=__version__,
            device_serial_number="none",
            content_label="LUMBAR_SPINE",
            content_description="Vertebrae, vertebral canal and intervertebral discs",
            series_description="lumbarflow segmentation",
        )
        write_atomically(path, segmentation.save_as)
    except OSError:  # no room, or no right to write
        raise
    except Exception as error:  # highdicom and pydicom check what is taken from the source's header, and quote it
        raise VolumeError(
            source.instances[0],
            f"a header that no DICOM-SEG can refer to ({type(error).__name__})",
            "the study, frame of reference and patient modules of one MR series",
            "Export the series again, or go without DICOM-SEG.",
        ) from None


def _meaning(label: int, numbered: bool) -> tuple[str, str]:
    """(name for people, class) of a label."""
    if not numbered:
        if label not in FOREGROUND:
            raise ValueError(f"unknown label {label}; expected a class from {list(FOREGROUND)}")
        return _NAMES[CLASSES[label]], CLASSES[label]
    if label == CANAL_ID:
        return _NAMES["canal"], "canal"
    if label > DISC_OFFSET:
        return f"Intervertebral disc {label - DISC_OFFSET} from the lowest", "IVD"
    if PARTIAL_OFFSET < label < DISC_OFFSET:
        return f"Vertebra {label - PARTIAL_OFFSET} from the lowest, cut off", "vertebrae"
    if 0 < label < CANAL_ID:
        return f"Vertebra {label} from the lowest", "vertebrae"
    raise ValueError(f"unknown label {label}; expected SPIDER's: 1.., {CANAL_ID}, {DISC_OFFSET + 1}..")


def _segment(number: int, name: str, kind: str, model_version: str) -> Any:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import Code, codes

    types = {
        "vertebrae": codes.SCT.Vertebra,
        "canal": codes.SCT.VertebralCanal,
        # DICOM's context groups name single discs alone, and which level a disc is at is not known.
        "IVD": Code("360499006", "SCT", "Intervertebral disc"),
    }
    return SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=codes.SCT.AnatomicalStructure,  # 91723000 in CID 7150
        segmented_property_type=types[kind],
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name="lumbarflow", family=codes.DCM.ArtificialIntelligence, version=model_version
        ),
        display_color=CIELabColor.from_string(PALETTE[kind]),
    )


def _headers(source: DicomVolume) -> Sequence[Any]:
    """The source's files without pixels, made to say what highdicom wants to hear where DICOM lets them differ."""
    import pydicom

    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in source.instances]
    for header in headers:
        for keyword in _IDENTITY:
            if keyword not in header:
                setattr(header, keyword, None)
        if header.get("SharedFunctionalGroupsSequence") or header.get("PerFrameFunctionalGroupsSequence"):
            _share_plane(header)
        else:
            # Reading has compared them; the same cosines may be rounded in several ways.
            header.ImageOrientationPatient = headers[0].ImageOrientationPatient
            if header.get("SliceThickness") is None:
                header.SliceThickness = source.volume.spacing_mm[2]
    return headers


def _share_plane(header: Any) -> None:
    """Move to the shared groups what scanners may repeat with each frame although it is the same."""
    from pydicom.dataset import Dataset

    if not header.get("SharedFunctionalGroupsSequence"):
        header.SharedFunctionalGroupsSequence = [Dataset()]
    shared = header.SharedFunctionalGroupsSequence[0]
    for sequence in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
        if not shared.get(sequence):
            setattr(shared, sequence, header.PerFrameFunctionalGroupsSequence[0][sequence].value)
