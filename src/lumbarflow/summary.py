"""How a run ends: what came out, what it read, left out and wrote, where to look, and what to do next.

The functions of RESULTS, READ and LEFT_OUT take what a catalog entry holds, when it is loaded or saved, and return at
once the words that the summary says of it ("" for nothing): nothing large is kept until the end. Of people's scans they
say counts alone.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumbarflow.cohort import ABSENT, ACCEPTED, IGNORED, REJECTED
from lumbarflow.download import without_credentials
from lumbarflow.progress import counted
from lumbarflow.store import Update

if TYPE_CHECKING:
    import pandas as pd

# --- what came out


def _evaluated(summary: Mapping[str, Any]) -> str:
    names = [key for key in summary if key.startswith("dice_") and key != "dice_background"]
    classes = ", ".join(f"{name.removeprefix('dice_')} {summary[name]:.4f}" for name in names)
    slices, patients = counted(summary["test_slices"], "slices"), counted(summary["test_patients"], "test patients")
    return f"mean foreground Dice {summary['mean_foreground_dice']:.4f} on {slices} of {patients} ({classes})"


def _registered(registration: Mapping[str, Any]) -> str:
    holds = "holds" if registration["promoted"] else "does not hold"
    return f"registered: {registration['name']} version {registration['version']}, {holds} {registration['alias']}"


def _downloaded(record: Mapping[str, Any]) -> str:
    counts = {row["folder"]: row["new"] + row["unchanged"] for row in record["files"] if row["folder"] != "."}
    new = sum(row["new"] for row in record["files"])
    volumes = " and ".join(counted(count, folder) for folder, count in counts.items())
    return f"{volumes} ({record['licence']}), {counted(new, 'files')} of it new"


# --- what was read


def _cohort(index: pd.DataFrame) -> str:
    patients, slices = index["patient"].nunique(), int(index["n_slices"].sum())
    return f"{len(index)} series of {counted(patients, 'patients')}, {counted(slices, 'slices')}"


def _slices(model_input: Any) -> str:
    manifest, parts = model_input.manifest, []
    for side, purpose in (("train", "train"), ("validation", "validate"), ("test", "test")):
        chosen = manifest["sides"][side]
        patients = {manifest["series"][name]["patient"] for name in chosen}
        parts.append(f"{sum(map(len, chosen.values()))} of {counted(len(patients), 'patients')} to {purpose}")
    return f"{manifest['data_kind']} slices, {', '.join(parts)}"


# --- what was left out


def _not_ingested(report: pd.DataFrame) -> str:
    counts = report["outcome"].value_counts()
    accepted, rejected = counts.get(ACCEPTED, 0), counts.get(REJECTED, 0)
    parts = [f"{rejected} of {accepted + rejected} series"] if rejected else []
    # A row of these stands for one file, or for several series or rows of the overview, and says for how many.
    others = report.loc[report["outcome"].isin([IGNORED, ABSENT]), "found"].value_counts(sort=False)
    return ", ".join([*parts, *(found if count == 1 else f"{count} x {found}" for found, count in others.items())])


def _filtered(index: pd.DataFrame) -> str:
    left = index.loc[~index["kept"], "reason"]
    reasons = [reason if count == len(left) else f"{count} {reason}" for reason, count in left.value_counts().items()]
    return f"{len(left)} of {counted(len(index), 'slices')} ({', '.join(reasons)})" if reasons else ""


def _not_read(report: pd.DataFrame) -> str:
    left = int((report["outcome"] != ACCEPTED).sum())
    return f"{left} of {counted(len(report), 'masks')}" if left else ""


def _not_tried(table: pd.DataFrame) -> str:
    left = int((table["outcome"] != "run").sum())
    return f"{left} of {counted(len(table), 'rows of the screen')}" if left else ""


def _failed_trials(table: pd.DataFrame) -> str:
    left = int((table["state"] == "failed").sum())
    return f"{left} of {counted(len(table), 'trials')}" if left else ""


def _no_scans(scans: Any) -> str:
    return ", ".join(f"{count} {what}" for what, count in getattr(scans, "passed_over", {}).items())


def _not_segmented(rows: pd.DataFrame) -> str:
    left = int((rows["outcome"] != "segmented").sum())
    return f"{left} of the {counted(len(rows), 'scans')} that the output folder knows" if left else ""


# Entry -> words.
RESULTS: dict[str, Callable[[Any], str]] = {
    "evaluation_summary": _evaluated,
    "registration": _registered,
    "download_record": _downloaded,
}
READ: dict[str, Callable[[Any], str]] = {
    "series_index": _cohort,
    "model_input": _slices,
    "external_masks": lambda masks: counted(len(masks), "files of masks"),
    "scans": lambda scans: counted(len(scans), "scans"),
    "registered_model": lambda model: model.title,
}
LEFT_OUT: dict[str, Callable[[Any], str]] = {
    "scans": _no_scans,
    "ingest_report": _not_ingested,
    "slice_index": _filtered,
    "external_report": _not_read,
    "screen_table": _not_tried,
    "tune_trials": _failed_trials,
    "scan_predictions": _not_segmented,
}
# Read where it is made: ingest looks through the raw scans for it.
COHORT = "series_index"
# The entry that holds the reasons, for people.
REASONS = {
    "ingest_report": "ingest_report_csv",
    "external_report": "external_report_csv",
    "screen_table": "screen_table_csv",
    "tune_trials": "tune_trials_csv",
    "scan_predictions": "scan_predictions",
}

# Entries that a person would open next, the first ones first.
TO_LOOK_AT = (
    "report_html",
    "report_markdown",
    "viewer_pages",
    "comparison_csv",
    "metrics_by_class_csv",
    "metrics_by_case_csv",
    "overlays_figure",
    "confusion_figure",
    "reliability_figure",
    "leakage_table_csv",
    "baselines_table_csv",
    "baselines_tests_csv",
    "tune_best",
    "tune_trials_csv",
    "screen_table_csv",
    "recipes_table_csv",
    "external_report_csv",
    "external_by_class_csv",
    "apta_audit_summary_csv",
    "scan_predictions",
    "scan_measurements",
    "training_history_csv",
    "filter_rules_csv",
    "ingest_report_csv",
    "download_record",
)

# Pipeline -> the pipeline to run after it, or another command, with what it is good for. None: there is nothing to run,
# because a person has to look first (report, predict, viewer), or because the log has said how to go on (tune,
# export_nnunet).
_REGISTERED = "kedro mlflow ui (runs, models), kedro viz run (the pipeline), {report} (all figures on one page)"
NEXT: dict[str, str | None] = {
    "download": "{ingest}",
    "synthesize": "{ingest}",
    "ingest": "{preprocess}",
    "preprocess": "{fit}",
    "fit": "{evaluate}",
    "evaluate": "{register}",
    "register": _REGISTERED,
    "train": _REGISTERED,
    "__default__": _REGISTERED,
    "leakage": "{report}",
    "baselines": "{report}",
    "evaluate_external": "{report}",
    "apta_audit": "{report}",
    "screen": "{recipes}",
    "recipes": "kedro mlflow ui (every recipe's curves and figures)",
    "rollback": "kedro mlflow ui (which version is the champion now)",
    "tune": None,
    "export_nnunet": None,
    "report": None,
    "predict": None,
    "viewer": None,
}


def next_step(pipeline: str, options: str, evaluated: bool) -> str:
    """What to do after a pipeline, "" if there is nothing to run.

    Args:
        pipeline: its name.
        options: of `options`, what the run's command had besides.
        evaluated: whether there are the figures that a report is written of.
    """

    class Commands(dict):
        def __missing__(self, name: str) -> str:
            return f"kedro run --pipeline={name}{options}"

    if not evaluated and (NEXT.get(pipeline) or "") == "{report}":
        return f"{Commands()['train']} (the model that a report is about)"
    return (NEXT.get(pipeline) or "").format_map(Commands())


def options(environment: str | None, parameters: Mapping[str, Any]) -> str:
    """The options that a further command needs to be about the same data and settings, as a shell takes them."""
    given = f" --env={environment}" if environment else ""
    flat = dict(_flat(parameters))
    if not flat:
        return given
    pairs = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in flat.items()}
    pairs = {name: without_credentials(value) for name, value in pairs.items()}
    if not all(isinstance(value, (str, int, float)) for value in flat.values()) or "," in "".join(pairs.values()):
        return f"{given} --params=... (the same as now)"  # nobody has typed these
    joined = ",".join(f"{name}={value}" for name, value in pairs.items())
    return f"{given} --params={shlex.quote(joined)}"


def _flat(parameters: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def shown(path: str | Path) -> str:
    """A path as a person at the command line has it: relative if it lies below the working directory."""
    path = Path(path)
    here = Path.cwd()
    text = (path.relative_to(here) if path.is_relative_to(here) else path).as_posix()
    return re.sub(r"^(\w+):/(?!/)", r"\1://", text)  # of an address, such as s3://, pathlib keeps one


def written(stores: Iterable[tuple[Path, str, Update]], files: Iterable[Path]) -> list[str]:
    """What was written, folder by folder.

    Args:
        stores: folder, what its items are (plural), and what was done to them.
        files: single ones, which are counted, and folders; what lies in a hidden one is nobody's to look at.
    """
    found: dict[Path, list[str]] = {}
    for folder, unit, update in stores:
        count, same = len(update.made) + len(update.reused), len(update.reused)
        unchanged = "" if not same else ", all unchanged" if same == count else f", {same} unchanged"
        found.setdefault(folder, []).append(f"{counted(count, unit)}{unchanged}")
    files = {path for path in files if not path.parent.name.startswith(".")}
    for folder in filter(Path.is_dir, files):
        found.setdefault(folder, [])
    folders = [path.parent for path in files if not path.is_dir()]
    for folder in dict.fromkeys(folders):
        count = folders.count(folder)
        found.setdefault(folder, []).append(counted(count, "files"))
    return [shown(folder) + (f" ({', '.join(what)})" if what else "") for folder, what in sorted(found.items())]
