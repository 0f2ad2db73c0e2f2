"""What other programs print for the calls that the documentation shows.

``python -m tests.peers nlme statsmodels …`` runs the blocks of a page that are in another program's
language, R's (``r``) in one session and Python's (``py``) in another, and keeps what they printed in
``tests/reference/peers/PAGE.txt``. In those blocks a line that begins with ``#>``, or ``# >`` as
formatters of Python write it, is such output;
``tests/test_docs.py`` asserts that it is in the file. A block without such a line is not run: not
every program is at hand.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "tests" / "reference" / "peers"
COMMANDS = {"r": ["Rscript", "-"], "py": [sys.executable, "-"]}
_PRINTED = re.compile(r"^# ?>(.*)$", re.MULTILINE)


def calls(page: Path, language: str) -> list[str]:
    """The blocks of a page that show what another program printed."""
    found = re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [block for block in found if _PRINTED.search(block)]


def shown(page: Path) -> list[str]:
    """The lines that a page says another program printed, blanks made one."""
    blocks = [block for language in COMMANDS for block in calls(page, language)]
    return [" ".join(line.split()) for block in blocks for line in _PRINTED.findall(block)]


def recorded(page: Path) -> set[str]:
    """The lines that it printed, blanks made one."""
    text = (RECORDED / f"{page.stem}.txt").read_text(encoding="utf-8")
    return {" ".join(line.split()) for line in text.splitlines()}


def record(page: Path) -> None:
    """Run the other programs of a page and keep what they print."""
    text = ""
    for language, command in COMMANDS.items():
        if code := "\n".join(calls(page, language)):
            done = subprocess.run(
                command, input=code, capture_output=True, text=True, cwd=ROOT, check=False
            )
            assert done.returncode == 0, done.stderr
            text += done.stdout
    RECORDED.mkdir(exist_ok=True)
    lines = [line.rstrip() for line in text.splitlines()]
    (RECORDED / f"{page.stem}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        record(ROOT / "docs" / f"{name}.md")
