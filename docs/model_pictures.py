"""Heat maps of the trees of the page of models, drawn when the documentation is built."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

from pictures import heat_map

#: How many rows a picture shows.
ROWS = 60


def draw_models(page: Path, folder: Path) -> None:
    """Run the blocks of the page, and draw ``V`` after each that makes one, named by its section."""
    folder.mkdir(parents=True, exist_ok=True)
    space: dict[str, Any] = {}
    for section in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        name = section.splitlines()[0].lower().replace(" ", "-")
        space.pop("V", None)
        for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block, str(page), "exec"), space)
        if "V" in space:
            matrix = space["V"]().detach()[:ROWS, :ROWS]
            heat_map(matrix, folder / f"{name}.png", inches=3.2, dpi=160)
