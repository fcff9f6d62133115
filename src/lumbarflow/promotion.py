"""Whether a new version of a model takes the champion's place, and why: rules alone, no registry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lumbarflow.labels import CLASSES, FOREGROUND

DATA_KINDS = ("real", "synthetic", "mixed")


@dataclass(frozen=True)
class ModelFacts:
    """What the promotion looks at; None, or empty, where a version does not say.

    Attributes:
        name, version: of the registered model.
        data_kind: one of DATA_KINDS.
        leaky: whether slices of one patient stand on several sides of the split.
        data_hash, split_hash: of the scans with the meaning of their labels, and of who is on which side.
        mean_foreground_dice: see `lumbarflow.metrics`, on the test patients.
        class_dice: foreground class -> its Dice, pooled over the test patients.
        case_dice: (digest of the patient, digest of the series) -> mean Dice of the foreground classes that this test
            case has; NaN if it has none.
        trained_on: digests of the patients that chose its weights (training and validation).
        tested_on: digests of the test patients.
        rolled_back: the version of the same weights that was rolled back, if there is one; this may be absent.
    """

    name: str
    version: str
    data_kind: str | None = None
    leaky: bool | None = None
    data_hash: str | None = None
    split_hash: str | None = None
    mean_foreground_dice: float | None = None
    class_dice: Mapping[str, float] = field(default_factory=dict)
    case_dice: Mapping[tuple[str, str], float] = field(default_factory=dict)
    trained_on: frozenset[str] | None = None
    tested_on: frozenset[str] | None = None
    rolled_back: str | None = None

    def missing(self) -> list[str]:
        """Names of the facts that are absent or make no sense."""
        usable = {
            "data_kind": self.data_kind in DATA_KINDS,
            "leaky": self.leaky is not None,
            "data_hash": bool(self.data_hash),
            "split_hash": bool(self.split_hash),
            "mean_foreground_dice": self.mean_foreground_dice is not None and math.isfinite(self.mean_foreground_dice),
            "class_dice": all(math.isfinite(self.class_dice.get(CLASSES[i], math.nan)) for i in FOREGROUND),
            "case_dice": bool(self.case_dice),
            "trained_on": bool(self.trained_on),
            "tested_on": bool(self.tested_on),
        }
        return [name for name, is_usable in usable.items() if not is_usable]


@dataclass(frozen=True)
class Decision:
    """Whether the alias moves to the candidate, and why, in plain words."""

    promote: bool
    reason: str


def decide_promotion(
    candidate: ModelFacts, champion: ModelFacts | None, alias: str, rules: Mapping[str, Any]
) -> Decision:
    """Compare a new version with the one that holds the alias (None if there is none).

    Two figures are worth comparing only if both models were tested on the same patients and neither had seen them. The
    candidate's mean foreground Dice must not be lower, no class may be lower by more than a tolerance, and a paired
    test over the cases must not show it worse.

    Args:
        rules: `class_tolerance` and `paired_test.alpha`, see the section `registration.promotion` of the parameters.
    """
    all_the_same = f"To serve it all the same: {by_hand(candidate.name, alias, candidate.version)}."

    def keep_back(reason: str, remedy: str = all_the_same) -> Decision:
        return Decision(False, f"{reason}. {remedy}")

    if candidate.leaky:
        return keep_back(
            "Its slices were split without regard to patients, so its figures are too good",
            f"A leaky model never becomes {alias}: split by patient (split.method patient or official).",
        )
    if missing := candidate.missing():
        return keep_back(f"It lacks a usable {', '.join(missing)}", "Run the training and its evaluation again.")
    if seen := len(candidate.trained_on & candidate.tested_on):
        return keep_back(f"It was trained on {seen} of its own test patients", "Run preprocess and the rest again.")
    # Registered anew (a training that goes on from its checkpoint gives the same net), it would undo the rollback.
    if candidate.rolled_back and not (champion and champion.version == candidate.rolled_back):
        return keep_back(f"Its net is the one of version {candidate.rolled_back}, which was rolled back")
    dice = candidate.mean_foreground_dice
    if champion is None:
        return Decision(True, f"There was no {alias}; its mean foreground Dice is {dice:.4f}.")

    holder = f"the {alias} (version {champion.version})"
    if missing := champion.missing():
        return keep_back(f"It cannot be compared with {holder}, which lacks a usable {', '.join(missing)}")
    if champion.data_kind == "real" and candidate.data_kind != "real":
        return keep_back(f"It was made from {candidate.data_kind} scans and {holder} from real ones")
    if candidate.data_hash != champion.data_hash:
        return keep_back(
            f"It was made from other data ({candidate.data_kind}, hash {candidate.data_hash[:8]}) than {holder} "
            f"({champion.data_kind}, hash {champion.data_hash[:8]}), so their figures cannot be compared"
        )
    if candidate.split_hash != champion.split_hash:
        return keep_back(
            f"It was made from another split (hash {candidate.split_hash[:8]}) than {holder} "
            f"(hash {champion.split_hash[:8]}), so their figures cannot be compared"
        )
    if seen := len(champion.trained_on & candidate.tested_on):
        return keep_back(
            f"The figure of {holder} is too good to compare: it was trained on {seen} of these test patients"
        )
    if unshared := len(candidate.case_dice.keys() ^ champion.case_dice.keys()):
        return keep_back(f"{unshared} test cases are not both its own and those of {holder}")

    former = champion.mean_foreground_dice
    if dice < former:
        ours, theirs = _told_apart(dice, former)
        return keep_back(f"Its mean foreground Dice of {ours} is lower than the {theirs} of {holder}")
    tolerance = rules["class_tolerance"]
    for name in (CLASSES[i] for i in FOREGROUND):
        if candidate.class_dice[name] < champion.class_dice[name] - tolerance:
            ours, theirs = _told_apart(candidate.class_dice[name], champion.class_dice[name])
            return keep_back(
                f"Its Dice of {name}, {ours}, is lower than the {theirs} of {holder} by more than the "
                f"{tolerance:g} allowed"
            )
    worse, finding = _paired_test(candidate.case_dice, champion.case_dice, rules["paired_test"]["alpha"])
    if worse:
        return keep_back(f"Case by case it is worse than {holder}: {finding}")
    return Decision(
        True,
        f"Its mean foreground Dice of {dice:.4f} is not lower than the {former:.4f} of version {champion.version}, "
        f"on the same test patients, and no class is lower by more than {tolerance:g}; {finding}.",
    )


def _paired_test(
    candidate: Mapping[tuple[str, str], float], champion: Mapping[tuple[str, str], float], alpha: float
) -> tuple[bool, str]:
    """Whether a paired test shows the candidate worse, and what it found.

    Args:
        candidate, champion: see `ModelFacts.case_dice`.
        alpha: p-values below it are significant.
    """
    import pandas as pd
    from scipy.stats import rankdata

    from lumbarflow.statistics import paired_wilcoxon

    table = pd.DataFrame(
        [
            {"model": model, "class": "all", "patient": patient, "dice": dice}
            for model, cases in (("candidate", candidate), ("champion", champion))
            for (patient, _), dice in cases.items()
        ]
    )
    test = paired_wilcoxon(table, "champion", "dice").iloc[0]
    means = table.groupby(["model", "patient"])["dice"].mean()
    differences = (means["candidate"] - means["champion"]).dropna()
    differing = differences[differences != 0]
    lower = bool(np.sign(differing) @ rankdata(differing.abs()) < 0)
    name = f"a paired Wilcoxon test over {test['n_patients']} test patients"
    if not len(differences):
        return False, "no test patient has a figure of both, so no paired test was made"
    if not len(differing):
        return False, f"{name} sees no difference (p = 1)"
    p = f"p = {test['p']:.2g}"
    if not alpha:
        return False, f"{name} has {p}, its ranks {'lower' if lower else 'not lower'}, and is switched off"
    if not test["p_smallest"] < alpha:
        return False, (
            f"{name} could not have shown it worse, so few of them differ ({len(differing)}: {p}, at best "
            f"{test['p_smallest']:.2g}; {alpha:g} is asked for)"
        )
    if lower and test["p"] < alpha:
        return True, f"{name} has {p}, below {alpha:g}"
    return False, f"{name} does not show it worse ({p}, its ranks {'lower' if lower else 'not lower'})"


def _told_apart(first: float, second: float) -> tuple[str, str]:
    """Two unequal figures with as many digits, from 4 on, as it takes to see the difference."""
    digits = next((n for n in range(4, 17) if f"{first:.{n}f}" != f"{second:.{n}f}"), 17)
    return f"{first:.{digits}f}", f"{second:.{digits}f}"


def by_hand(name: str, alias: str, version: str) -> str:
    """The line of Python that gives the alias to a version, whatever the rules say."""
    return f'mlflow.MlflowClient().set_registered_model_alias("{name}", "{alias}", "{version}")'
