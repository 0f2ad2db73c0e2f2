"""Notebooks of the tutorials, made of their pages: ``python docs/notebooks.py FOLDER`` writes them.

A page has a notebook when it offers one for download. Its blocks of Python become cells, with the output that
the page shows, so that a notebook holds the code that the tests run and nothing else.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

OFFER = re.compile(r"^\{download\}`.*?_generated/notebooks/.*?`.*\n\n?", re.MULTILINE)
BLOCK = re.compile(
    r"^```python\n(.*?)\n```\n(?:\n```text\n(.*?)\n```\n)?", re.MULTILINE | re.DOTALL
)


def plain(text: str) -> str:
    """The text of a page without what Jupyter does not read: roles, reference, links to other pages."""
    text = OFFER.sub("", text)
    text = re.sub(r"(## Reference\s+)?```\{eval-rst\}\n.*?```\n?", "", text, flags=re.DOTALL)
    text = re.sub(r"\{math\}`([^`]*)`", r"$\1$", text)
    text = re.sub(r"\{py:\w+\}`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return re.sub(r"\[([^\]]*)\]\((?!\w+:)[^)]*\)", r"\1", text).strip()


def notebook(page: Path) -> dict[str, Any]:
    """The notebook of a page, in version 4.5 of Jupyter's format."""
    cells: list[dict[str, Any]] = []

    def add(kind: str, source: str, **more: Any) -> None:
        cell = {"id": f"cell-{len(cells)}", "cell_type": kind, "metadata": {}, "source": source}
        cells.append({**cell, **more})

    text = page.read_text(encoding="utf-8")
    end = 0
    for block in BLOCK.finditer(text):
        if words := plain(text[end : block.start()]):
            add("markdown", words)
        code, shown = block.groups()
        printed = [{"output_type": "stream", "name": "stdout", "text": f"{shown}\n"}]
        add("code", code, execution_count=None, outputs=printed if shown else [])
        end = block.end()
    if words := plain(text[end:]):
        add("markdown", words)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": cells}


def tutorials(folder: Path) -> list[Path]:
    """The pages of a folder that offer a notebook."""
    pages = sorted(folder.glob("*.md"))
    return [page for page in pages if OFFER.search(page.read_text(encoding="utf-8"))]


def write_notebooks(pages: Path, folder: Path) -> None:
    """Write the notebook of each tutorial among ``pages`` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in tutorials(pages):
        text = json.dumps(notebook(page), indent=1, ensure_ascii=False)
        (folder / f"{page.stem}.ipynb").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_notebooks(Path(__file__).parent, Path(sys.argv[1]))
