"""A Markdown file and its preview."""

from __future__ import annotations

import inspect

from lumbarflow.datasets import MarkdownDataset


def test_markdown_is_previewed_as_it_stands(tmp_path):
    dataset = MarkdownDataset(filepath=str(tmp_path / "report.md"))
    text = "# metrics_by_class, metrics_by_case\n\n| vertebrae | 0.81 |\n"
    dataset.save(text)
    assert dataset.load() == dataset.preview() == text
    # Kedro-Viz reads the kind of the preview from this name.
    assert inspect.signature(dataset.preview).return_annotation == "TextPreview"
