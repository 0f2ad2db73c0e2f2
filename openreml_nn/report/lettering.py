"""Names of users in a picture: short enough for their room, in fonts that have their letters."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from openreml_nn.support.checks import check_count
from openreml_nn.support.display import visible
from openreml_nn.support.warning import warn

__all__ = ["abridged", "lettered", "literal"]


def abridged(names: Sequence[object], most: int) -> list[str]:
    """Names that are at most so wide, shortened in the way that leaves most of them different: at
    the end, in the middle, or at the start where all of them begin alike.

    Args:
        names: what is named, in order.
        most: the room, in letters; a letter of East Asia takes two.

    Raises:
        TypeError: if ``most`` is no whole number.
        InputError: if ``most`` is below 2.

    >>> abridged(["the northern station, plot 1", "the northern station, plot 2"], 12)
    ['the no…lot 1', 'the no…lot 2']
    """
    check_count("most", most, 2)
    texts = [visible(name) for name in names]
    least = min(texts, key=len) if len(texts) > 1 else ""
    same = 0
    while same < len(least) and all(text[same] == least[same] for text in texts):
        same += 1
    ways = [[_head(text, most) for text in texts], [_ends(text, most) for text in texts]]
    if same > 3:
        ways.append([_head("…" + text[same - 1 :], most) for text in texts])
    return max(ways, key=lambda way: len(set(way)))


def literal(name: str) -> str:
    """A name as matplotlib has to be given it, for which dollar signs enclose a formula."""
    return name.replace("$", r"\$")


@contextmanager
def lettered(names: Iterable[str]) -> Iterator[None]:
    """Let the texts that are made in the block be drawn with further fonts of this machine, where the
    font that is set has no letters for these names. Letters that no font has are told of by a
    RuntimeWarning, once."""
    from matplotlib import rc_context, rcParams
    from matplotlib.font_manager import FontProperties, findfont, get_font

    missing = {ord(letter) for name in names for letter in name if _is_drawn(letter)}
    if any(letter > 0x24F for letter in missing):
        missing -= set(get_font(findfont(FontProperties())).get_charmap())
        more = _further_fonts(frozenset(missing))
    else:  # every font has the letters of Latin
        more = []
    with rc_context({"font.family": [*rcParams["font.family"], *more]}):
        yield


@cache  # all fonts of a machine take long to open
def _further_fonts(needed: frozenset[int]) -> list[str]:
    """The fonts that have these letters, the one with most of them first."""
    from matplotlib.font_manager import fontManager, get_font

    missing = set(needed)
    offers: dict[str, set[int]] = {}
    for entry in fontManager.ttflist if missing else ():
        is_usual = entry.style == "normal" and entry.weight in (400, "normal", "regular")
        # The font of last resort has a box for every letter.
        if not is_usual or entry.name in offers or entry.name.startswith("Last Resort"):
            continue
        try:
            offers[entry.name] = missing & set(get_font(entry.fname).get_charmap())
        except (OSError, RuntimeError):  # a font that is gone, or has no outlines
            continue
    found = []
    while missing and offers:
        best = max(offers, key=lambda name: (len(offers[name] & missing), "Sans" in name))
        if not offers[best] & missing:
            break
        found.append(best)
        missing -= offers.pop(best)
    if missing:
        letters = "".join(map(chr, sorted(missing)[:20]))
        warn(
            f"no font on this machine has the letters {letters}{'…' * (len(missing) > 20)}, so that boxes "
            "stand for them in a plot: install a font that has them, such as Noto Sans of their script"
        )
    return found


def _is_drawn(letter: str) -> bool:
    """Whether a letter has a shape of its own: neither white nor a mark for the layout of others."""
    return not letter.isspace() and unicodedata.category(letter) not in ("Cc", "Cf", "Mn")


def _width(letter: str) -> int:
    """How many letters of English a letter is wide."""
    if unicodedata.combining(letter) or unicodedata.category(letter) in ("Cf", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def _fitting(text: str, room: int) -> int:
    """How many letters of the start of a text have room."""
    for count, letter in enumerate(text):
        room -= _width(letter)
        if room < 0:
            return count
    return len(text)


def _head(text: str, most: int) -> str:
    return text if _fitting(text, most) == len(text) else text[: _fitting(text, most - 1)] + "…"


def _ends(text: str, most: int) -> str:
    if _fitting(text, most) == len(text):
        return text
    back = text[::-1]
    tail = back[: _fitting(back, (most - 1) // 2)][::-1]
    return f"{text[: _fitting(text, most // 2)]}…{tail}"
