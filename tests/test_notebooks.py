"""The notebooks: clean as they are committed, and executed from a clean kernel in a project with small results."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from IPython.core.inputtransformer2 import TransformerManager

from lumbarflow.comparison import leakage_table

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = ["01_the_data", "02_training_and_leakage", "03_segment_a_scan"]

# The first of the executed ones waits for the training and for three kernels: on two busy cores, for minutes.
pytestmark = pytest.mark.timeout(1800)

# A cohort, a net and a training that take seconds; everything else is as in the configuration that users run.
SMALL = {
    "synthesize": {
        "patients": 5,
        "sequences": {"t1": 0.0, "t2": 1.0, "t2_SPACE": 0.0},
        "matrix": {"rows": [96, 112]},
        "acquisition": {"thick": {"slices": [7, 9], "samples": 1}},
    },
    "preprocess": {"size": [32, 32]},
    "model": {
        "encoder_widths": [8, 8, 16, 16],
        "decoder_widths": [16, 8],
        "encoder_dropouts": [0, 0, 0, 0],
        "decoder_dropouts": [0, 0],
    },
    "training": {"precision": "float32", "epochs": 4, "batch_size": 4, "learning_rate": 3.0e-3},
    "evaluation": {"intervals": {"samples": 50}},
}


def test_there_are_three_notebooks():
    assert [path.stem for path in NOTEBOOKS] == NAMES


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs_and_without_traces_of_a_machine(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        assert cell.metadata == {}, cell.id
        # Names that say what a cell is: random ones would change with every copy.
        assert re.fullmatch(r"[a-z_]+", cell.id), cell.id
    for cell in code_cells(notebook):
        assert cell.outputs == [] and cell.execution_count is None, cell.id
    assert not re.search(r"""(?<![\w.<:/])/(?!/)\w+/|\\Users|[A-Z]:\\\\""", text), "an absolute path"
    # As Jupyter writes it, so that a commit differs only in what somebody has changed.
    assert text == nbformat.writes(notebook) + "\n"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_no_logic(path):
    for cell in code_cells(nbformat.read(path, nbformat.NO_CONVERT)):
        tree = ast.parse(TransformerManager().transform_cell(cell.source))
        logic = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.comprehension)
        assert not [node for node in ast.walk(tree) if isinstance(node, logic)], cell.id


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_begins_with_the_commands_that_it_needs(path):
    from lumbarflow.pipeline_registry import register_pipelines

    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert "Needed first" in first.source and "jupyter lab notebooks" in first.source
    named = [
        name for names in re.findall(r"kedro run --pipelines?=([\w,]+)", first.source) for name in names.split(",")
    ]
    assert "train" in named
    assert set(named) <= set(register_pipelines())
    # Where it has not been given, one sentence says so.
    (setup,) = (cell.source for cell in notebook.cells if cell.id == "setup")
    assert re.search(r'^assert catalog\.exists\("\w+"\), f".* yet\. Run: \{COMMAND\}"$', setup, re.MULTILINE)


# --- executed ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Nothing of this shell's settings of Kedro, MLflow or TensorFlow, and no IPython profile of anybody's."""
    ours = {name: value for name, value in os.environ.items() if not re.match("KEDRO_|MLFLOW_|TF_|KERAS_", name)}
    return ours | {"PYTHONPATH": str(ROOT / "src"), "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython"))}


@pytest.fixture(scope="module")
def empty_project(tmp_path_factory) -> Path:
    """The configuration and the notebooks, and no results."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("pyproject.toml", ".telemetry", "conf", "notebooks"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    (folder / "src").mkdir()
    shutil.rmtree(folder / "conf/local")
    (folder / "conf/local").mkdir()
    return folder


@pytest.fixture(scope="module")
def project(empty_project, environment, tmp_path_factory) -> Path:
    """The same after a small training, and with a table of the pipeline `leakage`."""
    folder = tmp_path_factory.mktemp("with_results") / "project"
    shutil.copytree(empty_project, folder)
    (folder / "conf/local/parameters_small.yml").write_text(yaml.safe_dump(SMALL))
    command = [sys.executable, "-m", "kedro", "run", "--pipeline=train"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # Two more trainings would take longer than all else here: both runs have the figures of the one, but for the leak.
    reporting = folder / "data/08_reporting"
    by_class, intervals = (pd.read_parquet(reporting / f"metrics_{name}.parquet") for name in ("by_class", "intervals"))
    leaky = by_class.assign(run="slice", dice=by_class["dice"] + 0.0625)
    intervals = pd.concat([intervals.assign(run=run) for run in ("slice", "patient")])
    table = leakage_table(pd.concat([leaky, by_class.assign(run="patient")]), intervals, ["dice"])
    table.to_parquet(reporting / "leakage_table.parquet")
    return folder


def execute(path: Path, environment: dict[str, str]):
    """Run all cells as Jupyter does: in the notebook's folder; the kernel is this interpreter."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec
    from nbclient import NotebookClient

    class ThisInterpreter(AsyncKernelManager):
        # Whatever kernels are installed on this machine, and under whichever names.
        kernel_spec = KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], language="python"
        )

    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    client = NotebookClient(
        notebook, timeout=300, kernel_manager_class=ThisInterpreter, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute(env=environment)
    return notebook


def outputs(notebook, cell: str) -> list:
    (found,) = (found for found in notebook.cells if found.id == cell)
    return found.outputs


def texts(notebook, cell: str) -> str:
    """What a cell printed and showed, as plain text."""
    return "".join(
        output.text if output.output_type == "stream" else output.data["text/plain"]
        for output in outputs(notebook, cell)
    )


@pytest.fixture(scope="module")
def executed(project, environment, artefacts) -> dict:
    notebooks = {name: execute(project / "notebooks" / f"{name}.ipynb", environment) for name in NAMES}
    for name, notebook in notebooks.items():
        nbformat.write(notebook, artefacts / f"{name}.ipynb")
    return notebooks


FIGURES = {
    "01_the_data": ["preview", "examples"],
    "02_training_and_leakage": ["curves", "cases", "overlays", "split_figure"],
    "03_segment_a_scan": ["segment", "instances"],
}


@pytest.mark.integration
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_shows_its_figures_and_nothing_talks_over_it(executed, name):
    notebook = executed[name]
    shown = [cell.id for cell in code_cells(notebook) if any("image/png" in o.get("data", {}) for o in cell.outputs)]
    assert shown == FIGURES[name]
    streams = [output for cell in code_cells(notebook) for output in cell.outputs if output.output_type == "stream"]
    assert not [output.text for output in streams if output.name != "stdout"]
    assert not [output for cell in code_cells(notebook) for output in cell.outputs if output.output_type == "error"]
    printed = "".join(output.text for output in streams)
    warned = re.findall(r"^\d\d:\d\d:\d\d [WEC] (.*)$", printed, re.MULTILINE)
    # The one that belongs to the story.
    expected = ["split by slice"] if name == "02_training_and_leakage" else []
    assert [line.partition(":")[0] for line in warned] == expected, printed
    assert outputs(notebook, "setup") == []


@pytest.mark.integration
def test_the_data_are_those_of_the_run(executed, project):
    notebook = executed["01_the_data"]
    index = pd.read_parquet(project / "data/02_intermediate/series_index.parquet")
    assert re.search(rf"^t2\s+5\s+5\s+{index['n_slices'].sum()}\s", texts(notebook, "series"), re.MULTILINE)
    assert "101-125" in texts(notebook, "table")
    rules = pd.read_csv(project / "data/08_reporting/filter_rules.csv").query("sequence == 'all'")
    for row in rules.itertuples():
        shown = rf"{row.rule}\s+all\s+0\.55\s+{row.considered}\s+{row.kept}\s+{row.dropped}"
        assert re.search(shown, texts(notebook, "rules")), row.rule


@pytest.mark.integration
def test_the_figures_of_the_training_and_of_the_leak_are_those_of_the_run(executed, project):
    notebook = executed["02_training_and_leakage"]
    summary = json.loads((project / "data/08_reporting/evaluation_summary.json").read_text())
    assert f"mean foreground Dice {summary['mean_foreground_dice']:.4f}" in texts(notebook, "headline")
    assert re.search(rf"mean foreground\s+{summary['mean_foreground_dice']:.6f}", texts(notebook, "intervals"))
    # No patient on two sides of the split by patient; of the split by slice there are.
    assert re.findall(r"and \w+\s+(\d+)", texts(notebook, "patient_check")) == ["0", "0", "0"]
    assert "0" not in re.findall(r"and \w+\s+(\d+)", texts(notebook, "slice_check"))
    leak = pd.read_parquet(project / "data/08_reporting/leakage_table.parquet").query("scope == 'pooled'")
    assert len(leak) == 4
    for row in leak.itertuples():
        assert re.search(
            rf"{row[2]}\s+{row.slice_split:.6f}\s+{row.patient_split:.6f}\s+0\.0625", texts(notebook, "leak")
        )


@pytest.mark.integration
def test_the_champion_is_that_of_the_projects_own_registry(executed, project):
    notebook = executed["03_segment_a_scan"]
    # With the notebook's folder as working directory, a relative address would have made a store there.
    assert not list((project / "notebooks").glob("mlflow.db*")) and not (project / "notebooks/mlruns").exists()
    assert texts(notebook, "model") == "'lumbar-unet version 1'"
    (card,) = (output.data["text/markdown"] for output in outputs(notebook, "card"))
    assert "lumbar-unet, version 1" in card
    assert "volume_ml_vertebrae" in texts(notebook, "volumes")
    assert "lordosis" in texts(notebook, "measured")


@pytest.mark.integration
def test_without_results_a_notebook_says_which_command_makes_them(empty_project, environment):
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError) as caught:
        execute(empty_project / "notebooks" / f"{NAMES[0]}.ipynb", environment)
    assert caught.value.ename == "AssertionError"
    assert caught.value.evalue.endswith("yet. Run: kedro run --pipeline=train --env=local")
