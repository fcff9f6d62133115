"""What the tests share: volumes whose axes differ in size, spacing and direction, hypothesis's settings, a browser."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from hypothesis import settings

from lumbarflow.imaging import LabelMap, Volume

# With a test process on every core, the threads of each would only take the cores from the others.
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) >= (os.cpu_count() or 1) > 1:
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")

# With a file per process, what is begun last must be short. Roughly by their time, unit and integration tests together:
LONG_FILES = (
    "test_docs.py",
    "test_kubeflow.py",
    "test_main_job.py",
    "pipelines/test_train.py",
    "test_training.py",
    "pipelines/test_comparisons.py",
    "test_registry.py",
    "test_devices.py",
    "test_notebooks.py",
    "pipelines/test_other_storage.py",
    "pipelines/test_side_by_side.py",
    "test_registry_servers.py",
    "test_training_on_jax.py",
    "pipelines/test_screen.py",
    "pipelines/test_tune.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first; the order is otherwise pytest's."""
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


# Derandomized: a property that fails here fails on every machine. No deadline: machines are shared.
settings.register_profile("lumbarflow", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("lumbarflow")

# Half a turn of every axis into the next but one, so that no column or row can be taken for another.
OBLIQUE = np.array([[2.0, -1.0, 2.0], [2.0, 2.0, -1.0], [-1.0, 2.0, 2.0]]) / 3


@pytest.fixture(scope="session")
def give_up() -> Callable[[str], None]:
    """Skips a test for want of what it needs; in CI, which installs that, fails it: nobody would see the skip."""

    def give_up(reason: str) -> None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)

    return give_up


@pytest.fixture(scope="session")
def small_settings() -> dict:
    """A cohort and a net small enough for a run in a test; everything else is as in the users' configuration."""
    return {
        "synthesize": {
            "patients": 8,
            "sequences": {"t1": 0.0, "t2": 1.0, "t2_SPACE": 0.0},
            "matrix": {"rows": [88, 112]},
            "acquisition": {"thick": {"samples": 1}},
        },
        "preprocess": {"size": [64, 64]},
        "model": {
            "encoder_widths": [8, 16, 24, 32],
            "decoder_widths": [16, 8],
            "encoder_dropouts": [0, 0, 0, 0],
            "decoder_dropouts": [0, 0],
        },
        "training": {"precision": "float32", "epochs": 16, "batch_size": 4, "learning_rate": 3.0e-3},
        "evaluation": {"intervals": {"samples": 50}},
    }


@pytest.fixture(scope="session")
def artefacts() -> Path:
    """Where tests leave what a person may want to look at, such as screenshots; kept after the run, not in git."""
    folder = Path(__file__).parents[1] / "test-artefacts"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def chromium(give_up) -> Iterator:
    """Debian's Chromium without a window, drawing WebGL on the processor (playwright.sync_api.Browser)."""
    executable = shutil.which("chromium")
    if executable is None:
        give_up("no chromium on the PATH; run: source .ci/browser && install_browser")
    from playwright.sync_api import sync_playwright

    # Chromium's own sandbox does not start as root, as in CI; the tests show it only pages that we made.
    arguments = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium) -> Iterator:
    """An empty page (playwright.sync_api.Page) with no network but this machine's; what it asked of others fails the
    test, and so does an error that no script caught."""
    context = chromium.new_context(viewport={"width": 1400, "height": 900})
    strangers, errors = [], []

    def only_here(route) -> None:
        url = urlsplit(route.request.url)
        if url.scheme in ("http", "https", "ws", "wss") and url.hostname not in ("127.0.0.1", "localhost"):
            strangers.append(route.request.url)
            route.abort()
        else:
            route.continue_()

    context.route("**/*", only_here)
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert not errors
    assert not strangers, "pages are to work without a network"


@pytest.fixture(scope="session")
def make_volume() -> Callable[..., Volume]:
    """Factory of small volumes. Every voxel has its own value (up to the dtype's limit), in a scrambled order."""

    def make(shape=(4, 6, 5), *, kind=Volume, dtype=np.int16, direction=OBLIQUE, values=None, **geometry) -> Volume:
        if values is None:
            values = np.random.default_rng(0).permutation(int(np.prod(shape))).reshape(shape)
        geometry = {"spacing_mm": (0.75, 1.3, 3.9), "origin_mm": (-12.5, 30.25, 7.125)} | geometry
        return kind(np.asarray(values).astype(dtype), direction=direction, **geometry)

    return make


@pytest.fixture(scope="session")
def make_pair(make_volume) -> Callable[..., tuple[Volume, LabelMap]]:
    """Factory of an image and its mask in raw SPIDER ids: a vertebra, the canal and a disc on background."""

    def make(shape=(4, 6, 5), **geometry) -> tuple[Volume, LabelMap]:
        ids = np.zeros(shape, np.uint8)
        ids[:, 0], ids[:, 1], ids[:, 2] = 1, 100, 201
        return make_volume(shape, **geometry), make_volume(shape, kind=LabelMap, dtype=np.uint8, values=ids, **geometry)

    return make


@pytest.fixture(scope="session")
def make_dicom() -> MakeDicom:
    """Factory of synthetic DICOM series: see MakeDicom."""
    return MakeDicom()


class MakeDicom:
    """Writes a Volume as a DICOM series and returns its files in the order of the volume's slices.

    `make_dicom(folder, volume)` writes one MR Image Storage file per slice of the array's first axis, named
    IM0001.dcm on. Stored values are the array's (uint8, int16 or uint16, unchanged). Positions are exact up to
    DICOM's 16 characters; a reader that orders slices along cross(row, column) turns left-handed volumes over.

    Arguments:
        enhanced: one Enhanced MR file instead, IM0001.dcm, with a frame per slice.
        modality, series: the Modality tag (an enhanced file or not, the SOP class stays MR's); the number of the
            series, from which its UID comes. All series are of one study.
        transfer_syntax: "explicit", "implicit", "deflated", "rle", "jpeg" (lossless), "jpeg2000" (lossless) or
            "jpegls". The JPEG ones need slices of 32 x 32 at least.
        missing, duplicate: numbers of slices left out; of one slice written twice (as a second echo would be).
        shuffled: file names (or frames) in another order than the slices.
        rescale: one (slope, intercept) for all slices, or one for each; not written if None.
        edit: called with each dataset and the number of its slice (None: the enhanced file) before it is written.

    Every file carries `identifiers`, fake names and numbers that must not turn up anywhere else; UIDs start with
    `uid_root`, which is one of them. To truncate a file, cut its bytes.
    """

    uid_root = "1.2.826.0.1.3680043.8.498.47114711"
    patient = {
        "PatientName": "Leakova^Ivana", "PatientID": "LEAK-4711", "PatientBirthDate": "19471104", "PatientSex": "F",
        "AccessionNumber": "ACC471147", "StudyID": "STU4711", "StudyDate": "20471104", "StudyTime": "114711",
        "StudyDescription": "Leaky study", "SeriesDescription": "Leaky series", "InstitutionName": "Leak General",
        "ReferringPhysicianName": "Leakmann^Igor", "SeriesDate": "20471104", "StationName": "LEAKSTATION",
    }  # fmt: skip
    identifiers = (*(part for value in patient.values() for part in value.split("^") if part != "F"), uid_root)

    def __call__(
        self, folder: Path, volume: Volume, *, enhanced=False, modality="MR", series=1, transfer_syntax="explicit",
        missing=(), duplicate=None, shuffled=False, rescale=None, edit=lambda dataset, k: None,
    ) -> list[Path]:  # fmt: skip
        count = len(volume.array)
        written = [k for k in range(count) if k not in missing] + ([] if duplicate is None else [duplicate])
        if rescale is not None and not isinstance(rescale[0], tuple):
            rescale = [rescale] * count
        order = np.roll(range(len(written)), shuffled)  # of three or more: not its own inverse either
        numbers = {place: int(number) + 1 for place, number in enumerate(order)}
        folder.mkdir(parents=True, exist_ok=True)
        if enhanced:
            path = folder / "IM0001.dcm"
            frames = [written[place] for place in sorted(numbers, key=numbers.get)]
            dataset = self._enhanced(volume, frames, modality, series, rescale)
            edit(dataset, None)
            self._save(dataset, path, transfer_syntax)
            return [path]
        paths = []
        for place, k in enumerate(written):
            paths.append(folder / f"IM{numbers[place]:04d}.dcm")
            dataset = self._single(volume, k, f"{series}.{place + 1}", modality, series, rescale)
            edit(dataset, k)
            self._save(dataset, paths[-1], transfer_syntax)
        return paths

    def _header(self, array: np.ndarray, instance: str, sop_class: str, modality: str, series: int):
        from pydicom.dataset import Dataset, FileMetaDataset

        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = sop_class
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = f"{self.uid_root}.3.{instance}"
        for keyword, value in self.patient.items():
            setattr(dataset, keyword, value)
        dataset.StudyInstanceUID = f"{self.uid_root}.1"
        dataset.SeriesInstanceUID = f"{self.uid_root}.2.{series}"
        dataset.FrameOfReferenceUID = f"{self.uid_root}.4"
        dataset.PositionReferenceIndicator = ""
        dataset.SeriesNumber, dataset.InstanceNumber = series, int(instance.split(".")[-1])
        dataset.Modality, dataset.Manufacturer = modality, "Synthetic"
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "M", "SE"]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.Rows, dataset.Columns = array.shape[-2:]
        bits = array.dtype.itemsize * 8
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
        dataset.PixelRepresentation = int(array.dtype.kind == "i")
        dataset["PixelData"] = self._pixels(array)
        return dataset

    @staticmethod
    def _pixels(array: np.ndarray):
        from pydicom.dataelem import DataElement

        assert array.dtype in (np.uint8, np.int16, np.uint16), array.dtype
        data = array.astype(array.dtype.newbyteorder("<")).tobytes()
        return DataElement(0x7FE00010, "OB" if array.itemsize == 1 else "OW", data + b"\0" * (len(data) % 2))

    def _single(self, volume, k, instance, modality, series, rescale):
        dataset = self._header(volume.array[k], instance, "1.2.840.10008.5.1.4.1.1.4", modality, series)
        self._place(volume, k, dataset, dataset)
        self._measures(volume, dataset)
        if rescale is not None:
            dataset.RescaleSlope, dataset.RescaleIntercept = rescale[k]
            dataset.RescaleType = "US"
        return dataset

    def _enhanced(self, volume, frames, modality, series, rescale):
        from pydicom.dataset import Dataset

        array = volume.array[frames]
        dataset = self._header(array, f"{series}.1", "1.2.840.10008.5.1.4.1.1.4.1", modality, series)
        dataset.NumberOfFrames = len(frames)
        shared, orientation, measures = Dataset(), Dataset(), Dataset()
        self._measures(volume, measures)
        shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
        dataset.SharedFunctionalGroupsSequence, dataset.PerFrameFunctionalGroupsSequence = [shared], []
        for k in frames:
            position, content, groups = Dataset(), Dataset(), Dataset()
            self._place(volume, k, position, orientation)
            content.StackID, content.InStackPositionNumber, content.DimensionIndexValues = "1", k + 1, [1, k + 1]
            groups.PlanePositionSequence, groups.FrameContentSequence = [position], [content]
            if rescale is not None:
                values = Dataset()
                values.RescaleSlope, values.RescaleIntercept = rescale[k]
                values.RescaleType = "US"
                groups.PixelValueTransformationSequence = [values]
            dataset.PerFrameFunctionalGroupsSequence.append(groups)
        return dataset

    @staticmethod
    def _place(volume, k, position, orientation):
        position.ImagePositionPatient = _decimals(volume.physical_point([0, 0, k]))
        orientation.ImageOrientationPatient = _decimals(volume.direction[:, :2].T.ravel())

    @staticmethod
    def _measures(volume, dataset):
        x, y, z = volume.spacing_mm
        dataset.PixelSpacing = _decimals([y, x])  # between rows, between columns
        dataset.SliceThickness = _decimals([0.9 * z])[0]  # scanners leave a gap: the spacing is another number

    def _save(self, dataset, path, transfer_syntax):
        from pydicom import uid

        syntaxes = {
            "explicit": uid.ExplicitVRLittleEndian, "implicit": uid.ImplicitVRLittleEndian, "rle": uid.RLELossless,
            "deflated": uid.DeflatedExplicitVRLittleEndian, "jpeg": uid.JPEGLosslessSV1,
            "jpeg2000": uid.JPEG2000Lossless, "jpegls": uid.JPEGLSLossless,
        }  # fmt: skip
        dataset.file_meta.TransferSyntaxUID = syntaxes["explicit"]
        if transfer_syntax in ("rle", "jpegls"):
            dataset.compress(syntaxes[transfer_syntax], generate_instance_uid=False)
        dataset.file_meta.TransferSyntaxUID = syntaxes[transfer_syntax]
        if transfer_syntax in ("jpeg", "jpeg2000"):
            self._compress(dataset, transfer_syntax.upper())
        dataset.save_as(path, enforce_file_format=True)

    @staticmethod
    def _compress(dataset, compressor):
        """pydicom has no encoder of its own for these; SimpleITK's has."""
        import pydicom
        import SimpleITK as sitk
        from pydicom.encaps import encapsulate, get_frame

        assert min(dataset.Rows, dataset.Columns) >= 32, "GDCM's JPEG 2000 encoder crashes on less"
        dtype = np.dtype(f"<{'i' if dataset.PixelRepresentation else 'u'}{dataset.BitsAllocated // 8}")
        shape = (-1, dataset.Rows, dataset.Columns)
        frames = []
        with tempfile.TemporaryDirectory() as folder:
            for frame in np.frombuffer(dataset.PixelData, dtype, -1).reshape(shape):
                file = f"{folder}/frame.dcm"
                writer = sitk.ImageFileWriter()
                writer.SetImageIO("GDCMImageIO")
                writer.SetCompressor(compressor)
                writer.UseCompressionOn()
                writer.SetFileName(file)
                writer.Execute(sitk.GetImageFromArray(frame[None]))
                frames.append(get_frame(pydicom.dcmread(file).PixelData, 0, number_of_frames=1))
        dataset["PixelData"].value = encapsulate(frames)
        dataset["PixelData"].is_undefined_length = True


def _decimals(values) -> list:
    from pydicom.valuerep import DSfloat

    return [DSfloat(float(value), auto_format=True) for value in values]


@pytest.fixture(scope="session")
def make_graph(tmp_path_factory) -> Callable[..., Path]:
    """Factory of files with a net that ONNX Runtime computes: a convolution of each slice, with random weights."""

    def make(size: tuple[int, int]) -> Path:
        import onnx

        kernels = np.random.default_rng(3).normal(size=(4, 1, 3, 3)).astype(np.float32)
        nodes = [
            onnx.helper.make_node("Transpose", ["slices"], ["channels_first"], perm=[0, 3, 1, 2]),
            onnx.helper.make_node("Conv", ["channels_first", "kernels"], ["scores"], pads=[1, 1, 1, 1]),
            onnx.helper.make_node("Transpose", ["scores"], ["channels_last"], perm=[0, 2, 3, 1]),
            onnx.helper.make_node("Softmax", ["channels_last"], ["probabilities"], axis=-1),
        ]
        shapes = {"slices": ["n", *size, 1], "probabilities": ["n", *size, 4]}
        ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, at) for name, at in shapes.items()]
        constants = [onnx.numpy_helper.from_array(kernels, name="kernels")]
        net = onnx.helper.make_graph(nodes, "net", ends[:1], ends[1:], constants)
        model = onnx.helper.make_model(net, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
        onnx.helper.set_model_props(model, {"weights": "digest"})
        path = tmp_path_factory.mktemp("graph") / "net.onnx"
        onnx.save(model, path)
        return path

    return make
