# SPDX-License-Identifier: Apache-2.0
"""The Unicode form that every text has on its way in: NFC, without lone surrogates."""

import unicodedata
from typing import NoReturn

from dlm_jax.errors import UserError


def nfc(name: str) -> str:
    """Returns a name in NFC, to be compared with others; it may hold anything."""
    return unicodedata.normalize("NFC", name)


def normalize(text: str, where: str) -> str:
    """Returns the text in NFC (Unicode Standard Annex 15).

    where: the place of the text, for messages. Raises UserError for what no UTF-8 file
    can hold, a lone surrogate, and for NUL, which only files in another encoding hold.
    """
    if "\0" in text:
        refuse_nul(where)
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(
            f"{where} holds half a character, the lone surrogate \\u{code:04x}: "
            "remove it or restore the other half"
        ) from error
    return unicodedata.normalize("NFC", text)


def refuse_nul(where: str) -> NoReturn:
    """Raises UserError for a NUL character."""
    raise UserError(
        f"{where} holds a NUL character: remove it; if the file is UTF-16 or UTF-32, "
        "convert it to UTF-8"
    )
