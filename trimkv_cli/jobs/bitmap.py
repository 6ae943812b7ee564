"""A set of line numbers, one bit each."""

from __future__ import annotations

from trimkv_cli.errors import InputError

_MOST = 1 << 36  # 8 GiB of bits: no input has so many lines


class Bitmap:
    """Hold non-negative integers; grows as far as the largest."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self.count = 0

    def add(self, number: int) -> None:
        """Put `number` in.

        Raises:
            InputError: it is no line number.
        """
        if not 0 <= number < _MOST:
            raise InputError(f"{number} is no line number")
        place, bit = number >> 3, 1 << (number & 7)
        if place >= len(self._bits):
            self._bits.extend(bytes(max(1024, place + 1 - len(self._bits), len(self._bits) // 2)))
        if not self._bits[place] & bit:
            self._bits[place] |= bit
            self.count += 1

    def __contains__(self, number: int) -> bool:
        place = number >> 3
        return place < len(self._bits) and bool(self._bits[place] & 1 << (number & 7))
