# SPDX-License-Identifier: Apache-2.0
"""Settings whose numbers are data of a compiled program, not constants in it.

A number that turns a part of the program off, such as temperature 1, belongs to the
program's form. Every other value of it is data, so a new value compiles nothing.
"""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import jax


class Settings:
    """The base of a frozen dataclass of settings.

    NUMBERS: the fields that only scale, each with the value that turns it off, or None.
    """

    NUMBERS: ClassVar[Mapping[str, float | None]]

    def uses(self, name: str) -> bool:
        """Returns whether a number is not off; one that is traced never is."""
        value = getattr(self, name)
        return isinstance(value, jax.Array) or value != self.NUMBERS[name]

    def numbers(self) -> dict[str, Any]:
        """Returns the numbers that are not off, by name."""
        return {name: getattr(self, name) for name in self.NUMBERS if self.uses(name)}

    def form(self) -> Any:
        """Returns what a program is compiled for: None in the place of each number."""
        return self.join(dict.fromkeys(self.numbers()))

    def join(self, numbers: Mapping[str, Any]) -> Any:
        """Returns a copy with these numbers, traced or not; `form` and `numbers` make the whole."""
        made = copy.copy(self)
        for name, value in numbers.items():
            object.__setattr__(made, name, value)
        return made
