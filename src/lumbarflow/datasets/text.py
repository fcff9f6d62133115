"""Texts that Kedro-Viz shows."""

from __future__ import annotations

from typing import NewType

from kedro_datasets.text import TextDataset

# As kedro_datasets names the previews of its own: Kedro-Viz tells by the name how to show one.
TextPreview = NewType("TextPreview", str)


class MarkdownDataset(TextDataset):
    """A Markdown file; its preview is the text as it stands.

    Kedro-Viz knows previews in HTML too, but puts them into its own page, where their styles would be everybody's, and
    takes every underscore for emphasis.

    YAML:
        report_markdown:
          type: lumbarflow.datasets.MarkdownDataset
          filepath: data/08_reporting/report.md
    """

    def preview(self) -> TextPreview:
        return TextPreview(self.load())
