"""The documentation: its pages are what the code says, its site builds, and the commands of README and docs/ work.

What a block of commands is for stands in a comment above it, see docs/how-to/docs.md. Blocks marked `run` are run here,
page by page in the order of the site, on a small cohort with a small net.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import http.server
import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]

_BLOCK = re.compile(r"^(?:<!-- (?P<mark>.+?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
_MARKS = re.compile(
    r"run|run: answers at (?P<url>http://127\.0\.0\.1:\S+)|run by (?P<tests>tests/\S+::\w+(, tests/\S+::\w+)*)"
    r"|run by \.ci/run|test command|not run in CI: \S.*"
)
COMMANDS = ("bash", "sh", "python")
TEXTS = ("", "nginx", "text", "yaml")  # languages of blocks that nobody is to run
_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$\n?", re.DOTALL | re.MULTILINE)
_PROGRAM = re.compile(
    r"(?:[$>%] |sudo |env |[A-Z_]+=\S* )*(?:\S*/)?(?:kedro|python3?|pip|mlflow|zensical|pytest|jupyter|curl|git) "
)
# Commands in sentences that are neither a part of some block's nor a `kedro run`.
NOT_RUN = {
    "kedro ipython": "waits for somebody who types",
    "kedro jupyter lab": "JupyterLab is no part of the project",
    "zensical serve": "builds what `zensical build` builds, until it is stopped",
    "python3 -m http.server --bind 127.0.0.1 --directory site": "the tests serve that folder themselves",
    "pip install -q -c constraints.txt -e '.[dev]'": "what the test command does with uv",
    "pip install -c constraints.txt -e '.[dicom]'": "a part of the test command's installation",
    "pip install -c constraints.txt -e '.[jax]'": "a part of the test command's installation",
    "pip install -c constraints.txt -e '.[gpu]'": "needs a GPU",
    "python benchmarks/apta.py": "a benchmark wants an idle machine",
    "python benchmarks/training.py": "a benchmark wants an idle machine",
}

# So that the whole takes minutes on two cores: what the pages say stays as it is, the configuration of their copy not.
SMALL: dict[str, Any] = {
    "synthesize": {
        "patients": 6,
        "sequences": {"t1": 0.0, "t2": 1.0, "t2_SPACE": 0.0},
        "matrix": {"rows": [64, 72]},
    },
    "preprocess": {"size": [32, 32]},
    "model": {
        "encoder_widths": [8] * 3,
        "decoder_widths": [8],
        "encoder_dropouts": [0.0] * 3,
        "decoder_dropouts": [0.0],
    },
    # Enough of it for masks that are not empty.
    "training": {"precision": "float32", "epochs": 3, "batch_size": 2, "learning_rate": 1.0e-2, "warmup_epochs": 0},
    "evaluation": {"intervals": {"samples": 50}},
}


@pytest.fixture
def reference() -> Iterator[Any]:
    """docs/reference.py as a module. Of OmegaConf's resolvers the first of a name stays: they are nobody else's."""
    from omegaconf import OmegaConf
    from omegaconf.resolvers import oc

    resolvers = ("oc.env", "project", "artifact_location")
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    for name in resolvers:
        OmegaConf.clear_resolver(name)
    yield module
    for name in resolvers:
        OmegaConf.clear_resolver(name)
    OmegaConf.register_new_resolver("oc.env", oc.env)


def pages_of(nav: list | dict | str) -> Iterator[str]:
    """The pages of the site's navigation, in its order."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(entry)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, the comment above it, its language and text."""

    page: str
    line: int
    mark: str
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_run_here(self) -> bool:
        return self.mark == "run" or self.mark.startswith("run: ")

    @property
    def commands(self) -> list[str]:
        """Lines as a shell reads them: continued ones joined, comments left out. Python is one command."""
        if self.language == "python":
            return [self.text]
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        without = [re.sub(r"\s+# .*", "", line).strip() for line in lines]
        return [line for line in without if line and not line.startswith("#")]


def texts() -> list[Path]:
    """README.md, then the pages of the site in its order."""
    there = [DOCS / page for page in pages_of(SITE["nav"])]
    return [ROOT / "README.md", *(path for path in there if path.is_file())]


def blocks() -> list[Block]:
    found = []
    for path in texts():
        text = path.read_text()
        for match in _BLOCK.finditer(text):
            if match["language"] in COMMANDS:
                line = text[: match.start()].count("\n") + 1
                page = path.relative_to(ROOT).as_posix()
                found.append(Block(page, line, match["mark"] or "", match["language"], match["text"]))
    return found


def test_blocks_are_found_with_their_marks_and_commands():
    text = "Words\n\n<!-- run -->\n```bash\nkedro run \\\n  --pipeline=fit  # why\n# a remark\nls\n```\n"
    text += "\n```yaml\na: 1\n```"
    (first, second) = _BLOCK.finditer(text)
    assert (first["mark"], first["language"], second["mark"], second["language"]) == ("run", "bash", None, "yaml")
    block = Block("a.md", 3, "run", "bash", first["text"])
    assert block.commands == ["kedro run --pipeline=fit", "ls"]


def test_every_page_is_in_the_navigation_and_every_entry_of_it_is_there():
    named = sorted(pages_of(SITE["nav"]))
    assert named == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_the_reference_is_what_the_code_says(reference):
    parts = set()
    for path in sorted((DOCS / "reference").glob("*.md")):
        page = path.read_text()
        parts |= set(re.findall(r"<!-- from the code: (\w+) -->", page))
        assert reference.renewed(page) == page, f"{path.name} is not what the code says: run python docs/reference.py"
    assert parts == set(reference.TABLES)


def test_comments_of_a_yaml_file_become_meanings(reference, tmp_path):
    file = tmp_path / "a.yml"
    file.write_text(
        "# Of the whole.\nnet:\n  # Read, then\n  # known.\n  size_mm: [1, 2]  # rows, columns\n"
        "  box: {a: 1}\n  rows:\n    - 1\n    - 2\n\n# Elsewhere.\n\nlast: >-\n  two\n  words\n# The end.\nend: 1\n"
    )
    entries = [(entry.name, entry.value, entry.meaning) for entry in reference.entries(file)]
    assert entries == [
        ("net", "", "Of the whole."),
        ("net.size_mm", "[1, 2]", "Read, then known. rows, columns"),
        ("net.box", "{a: 1}", ""),
        ("net.rows", "2 rows", ""),
        ("last", "two words", ""),
        ("end", "1", "The end."),
    ]


def test_every_parameter_has_a_meaning_of_its_own_or_that_of_its_section(reference):
    said = {e.name: e.meaning for path in (ROOT / "conf/base").glob("parameters*.yml") for e in reference.entries(path)}
    sections = {name for name in said if any(other.startswith(f"{name}.") for other in said)}
    for name in set(said) - sections:
        parts = name.split(".")
        assert any(said[".".join(parts[:n])] for n in (*range(2, len(parts)), len(parts))), f"{name} has no comment"


def test_a_unit_is_told_by_the_end_of_a_name(reference):
    names = ("tolerance_mm", "minimum_component_mm3", "nsd_tolerance_pixels", "rows.missed_pixels", "epochs", "size")
    assert [reference.unit(name) for name in names] == ["mm", "mm³", "pixels", "", "epochs", ""]


def test_a_column_that_nobody_describes_is_an_error(reference, monkeypatch):
    monkeypatch.setattr(reference, "COLUMNS", {**reference.COLUMNS, "n_lost": ("nothing", "")})
    monkeypatch.delitem(reference.COLUMNS, "whole")
    with pytest.raises(ValueError, match=r"describes \['n_lost'\], which no table has, and not \['whole'\]"):
        reference.tables_of_figures()


def test_every_block_says_how_it_is_tested():
    found = blocks()
    assert len(found) > 30
    unmarked = [block.place for block in found if not _MARKS.fullmatch(block.mark)]
    assert not unmarked, "expected a comment above the block, see docs/how-to/docs.md"


def _strays(text: str) -> list[str]:
    """Lines of a page that may be commands and that no mark speaks for."""
    found = []
    for fence in _FENCE.finditer(text):
        if fence["language"] in TEXTS:
            found += [line for line in fence["text"].splitlines() if _PROGRAM.match(line.strip())]
        elif fence["language"] not in COMMANDS:
            found.append(f"```{fence['language']}")
    rest = re.sub(r"<!--.*?-->", "", _FENCE.sub("", text), flags=re.DOTALL)
    # What Markdown takes for code besides: other fences, lines that are indented after an empty one, and HTML.
    found += re.findall(r"^[ >]*(?:```|~~~|<pre|<code).*", rest, flags=re.MULTILINE)
    return found + re.findall(r"(?:\A|\n[ \t]*\n)((?: {4}|\t).*)", rest)


def test_no_command_escapes_the_marks():
    for path in texts():
        assert _strays(path.read_text()) == [], f"{path.name}: expected blocks of {COMMANDS} that begin with ```"


@pytest.mark.parametrize(
    "text",
    [
        "~~~bash\nkedro viz run\n~~~\n",
        "```console\n$ kedro viz run\n```\n",
        "```\n.venv/bin/kedro viz run\n```\n",
        "```text\n$ PATH=a mlflow ui\n```\n",
        "- a point\n\n  ```bash\n  kedro viz run\n  ```\n",
        "Words:\n\n    kedro viz run\n",
        "<pre>kedro viz run</pre>\n",
        "```bash title='a'\nkedro viz run\n```\n",
    ],
)
def test_commands_cannot_be_hidden(text):
    assert _strays(text) != []
    assert _strays("Words\n\n```text\nDIR/a.mha  a volume\n```\n\n- a point\n    goes on\n") == []


def _reached(tree: ast.Module, name: str) -> Iterator[ast.AST]:
    """The code of a test and of all in its file that it names: fixtures, helpers, constants."""
    named: dict[str, ast.AST] = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        named |= {getattr(target, "id", getattr(target, "name", "")): node for target in targets}
    assert name in named, f"{name}: no such test"
    seen, waiting = set(), [name, "pytestmark"]
    while waiting:
        if (current := waiting.pop()) in named and current not in seen:
            seen.add(current)
            for node in ast.walk(named[current]):
                waiting.append(getattr(node, "id", getattr(node, "arg", None)))
                yield node


# By any of these a test, or its whole file, can be kept from running in CI.
_NOT_ALWAYS = {"skip", "skipif", "importorskip", "xfail", "container", "long"}


def _given_by(test: str) -> set[str]:
    """Commands that a test gives: its texts, and pipelines that it or its fixtures run. Environments and parameters are
    the test's own."""
    file, name = test.split("::")
    if name == test_the_commands_of_the_documentation.__name__:
        return {command for block in blocks() if block.is_run_here for command in block.commands}
    nodes = list(_reached(ast.parse((ROOT / file).read_text()), name))
    given = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    words = {getattr(node, "attr", getattr(node, "id", "")) for node in nodes}
    assert not _NOT_ALWAYS & words, f"{test} is not always run"
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            words = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            if node.func.id == "kedro" and words:
                given.add(" ".join([".venv/bin/kedro", *words]))
            elif node.func.id == "kedro_run" and words:
                given.add(f".venv/bin/kedro run --pipeline={words[0]}")
    return given


def test_blocks_that_other_tests_run_are_run_there():
    for block in blocks():
        if tests := (_MARKS.fullmatch(block.mark) or {"tests": None})["tests"]:
            given = set().union(*map(_given_by, tests.split(", ")))
            for command in block.commands:
                # The installation in front of it is that of the test command, which CI runs.
                command = command.split(" && ")[-1]
                pipeline = re.sub(r" --(env|params)=\S+", "", command)
                assert {command, pipeline} & given, f"{block.place}: {tests} does not give {command!r}"


def test_what_ci_runs_is_an_installation():
    # .ci/run gives the README's test command; whatever claims to be run there must be a part of it.
    (command,) = (block.commands[0] for block in blocks() if block.mark == "test command")
    for block in blocks():
        if block.mark == "run by .ci/run":
            assert all(command.startswith(part) for part in block.commands), block.place


def test_a_test_that_gives_a_command_gives_it_itself(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "test_x.py").write_text(
        "RUN = 'kedro viz run'\ndef ready(kedro_run):\n    kedro_run('fit')\n"
        "def test_a(ready):\n    assert RUN\ndef test_b(kedro_run):\n    kedro_run('tune')\n"
        "@pytest.mark.skip\ndef test_c():\n    pass\n"
        "def test_e():\n    skip('never')\ndef test_f():\n    pytest.importorskip('antigravity')\n"
        "@pytest.mark.container\ndef test_g():\n    pass\n"
        "@pytest.mark.long\ndef test_i():\n    pass\n@pytest.mark.xfail\ndef test_j():\n    pass\n"
        "@pytest.mark.skipif(True, reason='never')\ndef test_k():\n    pass\n"
    )
    (tmp_path / "test_y.py").write_text("pytestmark = pytest.mark.skip\ndef test_h():\n    pass\n")
    assert _given_by("test_x.py::test_a") == {"kedro viz run", "fit", ".venv/bin/kedro run --pipeline=fit"}
    assert _given_by("test_x.py::test_b") == {"tune", ".venv/bin/kedro run --pipeline=tune"}
    for test in (*(f"test_x.py::test_{letter}" for letter in "cefgijk"), "test_y.py::test_h"):
        with pytest.raises(AssertionError, match=f"{test} is not always run"):
            _given_by(test)
    with pytest.raises(AssertionError, match="no such test"):
        _given_by("test_x.py::test_d")


def _inline(text: str) -> list[str]:
    """Commands in sentences and tables, without the folder of the program."""
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", _FENCE.sub("", text))]
    return [span.removeprefix(".venv/bin/") for span in spans if _PROGRAM.match(span)]


def test_commands_in_sentences_are_those_of_blocks_or_say_why_not():
    in_blocks = [command.removeprefix(".venv/bin/") for block in blocks() for command in block.commands]
    found = {command for path in texts() for command in _inline(path.read_text())}
    others = {
        command
        for command in found
        if not command.startswith("kedro run ") and not any(command in whole for whole in in_blocks)
    }
    assert others <= set(NOT_RUN), "expected each in a block, or in NOT_RUN with the reason"
    assert set(NOT_RUN) - others <= {name for name in NOT_RUN if name.startswith("pip ")}, "no page says these"


def test_every_pipeline_is_run_as_some_page_says():
    from lumbarflow.pipeline_registry import register_pipelines

    commands = " ".join(command for block in blocks() for command in block.commands)
    given = set(re.findall(r"kedro run --pipeline=(\w+)", commands))
    # Alone, as their sentences have them; in blocks they are parts of `train`.
    given |= set(re.findall(r'kedro_run\("(evaluate|register)"', (ROOT / "tests/pipelines/test_train.py").read_text()))
    assert given == set(register_pipelines()) - {"__default__"}


def test_commands_in_sentences_name_what_there_is():
    from lumbarflow.pipeline_registry import register_pipelines

    pipelines, seen = set(register_pipelines()), 0
    for path in texts():
        for command in _inline(path.read_text()):
            if not command.startswith("kedro run "):
                continue
            for option in shlex.split(command)[2:]:
                name, _, value = option.partition("=")
                assert name in ("--pipeline", "--pipelines", "--env", "--params"), f"{path.name}: {command}"
                assert not name.startswith("--pipeline") or set(value.split(",")) <= pipelines, (
                    f"{path.name}: {command}"
                )
                assert name != "--env" or (ROOT / "conf" / value).is_dir(), f"{path.name}: {command}"
            seen += 1
    assert seen > 20


def test_variables_named_in_the_reference_are_read_somewhere():
    named = re.findall(r"^\| `([A-Z_]+)` \|", (DOCS / "reference/parameters.md").read_text(), flags=re.MULTILINE)
    assert len(named) == 5
    read = [*(ROOT / "src").rglob("*.py"), *(ROOT / "conf").rglob("*.yml")]
    sources = "\n".join(path.read_text() for path in read)
    assert [name for name in named if name not in sources] == []


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site as the documentation builds it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copy(ROOT / "zensical.toml", folder)
    shutil.copytree(DOCS, folder / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [Path(sys.executable).with_name("zensical"), "build", "--strict"],
        cwd=folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout + done.stderr, "a warning is a broken link"
    return folder / "site"


def test_the_site_builds_without_warnings_and_refers_to_nobody(site):
    for page in pages_of(SITE["nav"]):
        html = (site / page).with_suffix(".html").read_text()
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?(https?:[^\"' >]+)", html)
        assert not loaded, page


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.integration
def test_the_site_in_a_browser(site, page, artefacts):
    # The fixture `page` fails if anything is asked of another machine.
    with served(site) as address:
        page.set_default_timeout(120_000)  # shared machines are slow
        page.goto(f"{address}/index.html")
        assert page.title() == "Home - lumbarflow"
        page.screenshot(path=artefacts / "docs_index.png")
        page.get_by_role("link", name="Reference", exact=True).first.click()
        page.get_by_role("heading", name="Parameters", level=1).wait_for()
        page.screenshot(path=artefacts / "docs_parameters.png")
        page.get_by_role("link", name="Classes and colours").first.click()
        page.get_by_role("heading", name="Classes, labels and colours", level=1).wait_for()
        swatch = page.locator("tr", has_text="vertebrae").locator(".swatch").first
        assert swatch.evaluate("patch => getComputedStyle(patch).backgroundColor") == "rgb(230, 159, 0)"
        page.screenshot(path=artefacts / "docs_labels.png")
        # The search is a closed shadow tree: what it found is followed by the keyboard. It reads its index first.
        page.keyboard.press("Control+k")
        page.wait_for_timeout(1000)
        page.keyboard.type("calibration", delay=50)
        for _ in range(60):
            page.wait_for_timeout(1000)
            page.screenshot(path=artefacts / "docs_search.png")
            page.keyboard.press("Enter")
            if "labels.html" not in page.url:
                break
        page.wait_for_url("**/explanation/evaluation.html**")
        for name in ("explanation/paper", "tutorial/first-run", "reference/metrics", "reference/catalog"):
            page.goto(f"{address}/{name}.html")
            page.screenshot(path=artefacts / f"docs_{name.split('/')[1]}.png")


def _merge(values: dict, changes: dict) -> None:
    for name, change in changes.items():
        if isinstance(change, dict) and isinstance(values.get(name), dict):
            _merge(values[name], change)
        else:
            values[name] = change


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project in which everything is small."""
    for name in ("pyproject.toml", ".telemetry", "conf", "src", "docs", "zensical.toml"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    shutil.rmtree(tmp_path / "conf/local")
    (tmp_path / "conf/local").mkdir()
    (tmp_path / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)
    for path in (tmp_path / "conf").glob("*/parameters*.yml"):
        values = yaml.safe_load(path.read_text()) or {}
        _merge(values, {name: change for name, change in SMALL.items() if name in values})
        path.write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / '.venv/bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def run_kedro(project: Path) -> Iterator[Callable[[list[str]], None]]:
    """Kedro's own command line in this process: each start of one costs ten seconds, of TensorFlow mostly."""
    import mlflow
    from kedro.framework.cli.cli import KedroCLI
    from kedro.framework.startup import bootstrap_project
    from kedro_mlflow.framework.hooks import mlflow_hook

    bootstrap_project(project)
    former = mlflow.get_tracking_uri()

    def run(arguments: list[str]) -> None:
        # kedro-mlflow's one hook object remembers the last run's id; in a process of its own it has none.
        mlflow_hook.run_id = None
        while mlflow.active_run():
            mlflow.end_run()
        try:
            KedroCLI(project_path=project).main(args=arguments, prog_name="kedro", standalone_mode=False)
        except SystemExit as end:
            assert not end.code, arguments

    yield run
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri(former)


class Reader:
    """Somebody who follows the pages: puts folders in the place of DIR, and gives each command once."""

    def __init__(self, project: Path, run_kedro: Callable[[list[str]], None]):
        self.project, self.run_kedro = project, run_kedro
        self.folders = {
            "raw_dir": project / "data/01_raw",
            "external_dir": project / "external",
            "scans": project / "scans",
            "LUMBARFLOW_ALLOWED_FOLDER": project / "scans",
            "--model-input": project / "data/05_model_input",
        }
        self.names: dict[str, Any] = {}
        self.done: set[str] = set()
        self.seconds: dict[str, float] = {}
        self.servers: list[subprocess.Popen] = []

    def follow(self, block: Block) -> None:
        url = _MARKS.fullmatch(block.mark)["url"]
        for command in block.commands:
            if command in self.done and not url:
                continue
            self.done.add(command)
            start = time.monotonic()
            print(f"\n=== {block.place}: {command}", flush=True)
            if block.language == "python":
                exec(compile(command, block.place, "exec"), self.names)  # what a reader would paste
            elif url:
                self.serve(self.filled(command), url)
            else:
                self.shell(self.filled(command), block.place)
            self.seconds[command] = time.monotonic() - start

    def filled(self, command: str) -> str:
        """DIR by what stands before it; outputs get a folder each."""
        number = len(self.done)

        def folder(match: re.Match) -> str:
            known = self.folders.get(match[1])
            return f"{match[1]}{match[2]}{known or self.project / f'output/{number}'}"

        command = re.sub(r"([\w-]+)([= ])DIR\b", folder, command)
        return command.replace("DIR", str(self.folders["scans"]))

    def shell(self, command: str, place: str) -> None:
        if command.startswith(".venv/bin/kedro "):
            self.run_kedro(shlex.split(command)[1:])
            return
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.project, capture_output=True, text=True, timeout=300, env=_environment()
        )
        assert done.returncode == 0, f"{place}: {command}\n{done.stdout}{done.stderr}"

    def serve(self, command: str, url: str) -> None:
        # One that an interrupted test has left would answer in its place.
        with socket.socket() as connection:
            taken = connection.connect_ex(("127.0.0.1", urlsplit(url).port)) == 0
        assert not taken, f"something answers at {url} already; expected a free port for: {command}"
        log = self.project / "server.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                ["bash", "-c", f"exec env {command}"], cwd=self.project, stdout=stream, stderr=stream,
                start_new_session=True, env=_environment() | {"PATH": _without_this_environment()},
            )  # fmt: skip
        self.servers.append(process)
        end = time.monotonic() + 180
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=5):
                return
            time.sleep(0.5)
        raise AssertionError(f"{command} does not answer at {url}\n{log.read_text()}")

    def turn_the_page(self) -> None:
        """End the servers of a page."""
        for process in self.servers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)  # with the workers that it started
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
        self.servers.clear()


def _without_this_environment() -> str:
    """The PATH of a shell in which nobody has activated it."""
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not Path(folder, "mlflow").exists())


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("KERAS_BACKEND", "PYTHONPATH")}
    # MLflow starts four workers otherwise, and each imports all of it; JAX compiles for longer than it trains here.
    return kept | {"MLFLOW_WORKERS": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.mark.integration
@pytest.mark.timeout(1800)  # 4 minutes on two idle cores
def test_the_commands_of_the_documentation(project, run_kedro, make_dicom):
    reader = Reader(project, run_kedro)
    # The tutorial comes first, as for a reader: it makes the scans and the champion that all others use.
    tutorial = [block for block in blocks() if block.page.startswith("docs/tutorial")]
    others = [block for block in blocks() if not block.page.startswith("docs/tutorial")]
    try:
        page = None
        for block in tutorial + others:
            if block.page != page:
                reader.turn_the_page()
                page = block.page
            if block.is_run_here:
                reader.follow(block)
            if not reader.names:
                _lay_out_scans(project, reader, make_dicom)
    finally:
        reader.turn_the_page()
        for command, seconds in sorted(reader.seconds.items(), key=lambda item: -item[1]):
            print(f"{seconds:6.1f} s  {command.splitlines()[0]}")
    assert reader.done == _given_by(f"{__file__}::test_the_commands_of_the_documentation")
    assert (project / "data/08_reporting/metrics_by_class.csv").is_file()
    assert (project / "data/spider/08_reporting/report.html").is_file()
    assert list((project / "output").glob("*/1_t2_seg.mha"))
    assert list((project / "output").glob("*/exam_1_seg.dcm"))
    assert list((project / "output").glob("*/best.keras"))
    assert (project / "site/index.html").is_file()


def _lay_out_scans(project: Path, reader: Reader, make_dicom) -> None:
    """Once the first run has made scans: some under the names that the pages use, and masks of classes."""
    from lumbarflow.imaging import LabelMap, Volume, read_volume, to_sagittal, write_volume
    from lumbarflow.labels import LabelTable

    raw = project / "data/01_raw"
    images = sorted((raw / "images").glob("*.mha"))
    if not images:
        return
    scan = read_volume(images[0])
    scan = Volume(scan.array.astype(np.int16), scan.spacing_mm, scan.origin_mm, scan.direction)
    for path in (project / "scans/1_t2.mha", project / "a.mha", project / "scan.nii.gz"):
        write_volume(scan, path)
    for folder in (project / "dicom_folder", project / "scans/exam"):
        make_dicom(folder, scan)
    table = LabelTable(yaml.safe_load((project / "conf/base/parameters_ingest.yml").read_text())["labels"]["table"])
    for path in (raw / "masks").glob("*.mha"):
        ids = read_volume(path, LabelMap)
        classes = LabelMap(table.classes(ids.array), ids.spacing_mm, ids.origin_mm, ids.direction)
        write_volume(classes, project / "external" / path.name)
    reader.names["slices"] = to_sagittal(scan)[0].array
