# SPDX-License-Identifier: Apache-2.0
"""Fonts whose glyphs cover the characters of a plot's texts."""

import unicodedata
from collections.abc import Iterable
from functools import lru_cache

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from dlm_jax import console

BOX = "\u25a1"  # stands for a character without a glyph


def families(texts: Iterable[str], family: str) -> list[str]:
    """Returns font families, `family` first, that draw the texts as far as fonts do.

    matplotlib takes each glyph from the first of them that has it.
    """
    left = set().union(*texts) - _characters(_path(family))
    others = dict.fromkeys(_font_of(character) for character in sorted(left))
    return [family, *(name for name in others if name)]


def shown(text: str) -> str:
    """Returns a text with BOX in the place of each character that no font has."""
    return "".join(c if _font_of(c) or c.isspace() else BOX for c in text)


def warn_of_missing(texts: Iterable[str]) -> None:
    """Prints a line if no installed font has some characters of the texts."""
    missing = sorted(c for c in set().union(*texts) if shown(c) != c)
    if missing:
        console.say(
            f"no installed font has {len(missing)} of the characters, such as "
            f"{', '.join(missing[:5])}: boxes stand for them in the plots; install a "
            "font that has them, such as Noto Sans CJK"
        )


def _path(family: str) -> str:
    return font_manager.findfont(font_manager.FontProperties(family=[family]))


@lru_cache(maxsize=2**17)
def _font_of(character: str) -> str:
    """Returns the family of the first font that has a character, or an empty string."""
    first = _path("sans-serif")
    fonts = font_manager.fontManager.ttflist
    rest = {f.fname: f.name for f in fonts if not f.name.startswith("Last Resort")}
    for path in {first: None, **rest}:
        if character in _characters(path):
            return rest.get(path, "sans-serif")
    return ""


@lru_cache(maxsize=1024)
def _characters(path: str) -> frozenset[str]:
    """Returns the characters that a font file has glyphs of; none if it is not read."""
    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError, ValueError):
        return frozenset()


def columns(text: str) -> int:
    """Counts the columns of a text at a fixed width: wide characters have two."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))
