"""Tables that may not be there."""

from __future__ import annotations

import pandas as pd
from kedro.io import DatasetError
from kedro_datasets.pandas import CSVDataset


class OptionalCSVDataset(CSVDataset):
    """A CSV table that may be absent or an empty file, such as `overview.csv` beside somebody's own scans."""

    def load(self) -> pd.DataFrame:
        if not self._exists():
            return pd.DataFrame()
        try:
            return super().load()
        except DatasetError as error:
            if isinstance(error.__cause__, pd.errors.EmptyDataError):
                return pd.DataFrame()
            raise
