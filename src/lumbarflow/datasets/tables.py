"""Tables that may not be there."""

from __future__ import annotations

import pandas as pd
from kedro_datasets.pandas import CSVDataset


class OptionalCSVDataset(CSVDataset):
    """A CSV table whose absence is an empty table, such as `overview.csv` beside somebody's own scans."""

    def load(self) -> pd.DataFrame:
        return super().load() if self._exists() else pd.DataFrame()
