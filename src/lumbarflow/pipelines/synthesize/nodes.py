"""Synthetic scans for whoever has none."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from lumbarflow import phantom
from lumbarflow.files import source_digest, value_digest
from lumbarflow.store import Work

logger = logging.getLogger(__name__)


def synthesize_scans(settings: dict[str, Any], raw_dir: str, synthetic_dir: str) -> dict[str, Work]:
    """Plan the synthetic cohort; its scans are drawn one at a time as they are saved.

    Nothing is planned when the run reads its raw scans from elsewhere than the synthetic folder.
    """
    if raw_dir != synthetic_dir:  # both absolute, made so by the configuration
        logger.info("synthesize: nothing, the raw series come from %s", raw_dir)
        return {}
    plans = phantom.plan_cohort(settings)
    code = source_digest(phantom)
    rows = phantom.overview(plans).set_index("new_file_name", drop=False).to_dict("index")

    def draw(plan: phantom.SeriesPlan) -> dict[str, Any]:
        image, mask = phantom.render(plan, settings)
        record = {"anatomy": phantom.anatomy(plan, settings), "overview": rows[plan.name]}
        return {"image.mha": image, "mask.mha": mask, "record.json": record}

    return {plan.name: Work(value_digest([code, settings, plan.name]), partial(draw, plan)) for plan in plans}
