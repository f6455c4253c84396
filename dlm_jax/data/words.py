# SPDX-License-Identifier: Apache-2.0
"""Splits texts into the units that measures count: words, or characters without spaces.

Scripts that set no spaces between words are those of the classes ID, CJ, SA and AK of
Unicode's line breaking (Unicode Standard Annex 14), such as Chinese, Japanese, Thai,
Khmer and Javanese, and Tibetan.
"""

import regex

UNSPACED = r"[\p{lb=ID}\p{lb=CJ}\p{lb=SA}\p{lb=AK}\p{Script=Tibetan}]"
LONGEST_WORD = 40  # characters; a longer stretch without spaces is no word
_UNIT = regex.compile(rf"{UNSPACED}\p{{M}}*|(?:(?!{UNSPACED})\S)+")
_CHARACTER = regex.compile(r"\X")


def words(text: str) -> list[str]:
    """Returns the words of a text, without spaces.

    Each character, with its marks, is a word of its own in scripts without spaces and
    in a stretch of over LONGEST_WORD characters.
    """
    units = text.split() if text.isascii() else _UNIT.findall(text)
    if all(len(unit) <= LONGEST_WORD for unit in units):
        return units
    parts = ([u] if len(u) <= LONGEST_WORD else _CHARACTER.findall(u) for u in units)
    return [part for unit in parts for part in unit]


def starts_unspaced(text: str) -> bool:
    """Returns whether a text begins in a script that sets no spaces between words."""
    return regex.match(UNSPACED, text) is not None
