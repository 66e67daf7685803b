"""How numbers are written for people: counts, measurements, durations and bytes, in plain ASCII."""

from __future__ import annotations

import math

__all__ = ["UNKNOWN", "count", "duration", "number", "printable", "rate", "size"]

UNKNOWN = "n/a"
"""What stands for a number that is missing or not finite."""


def count(value: float) -> str:
    """A whole number with thousands separated: ``1437`` -> ``1,437``."""
    return f"{round(value):,}"


def number(value: float | None, *, digits: int = 4, trim: bool = True) -> str:
    """A measurement to ``digits`` significant digits: ``0.4321``, ``1,437``, ``1.2e-3``.

    ``trim`` drops trailing zeros; without it the width stays steady from line to line.
    """
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value == 0:
        return "0"
    size = abs(value)
    if size < 0.01 or size >= 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{_trimmed(mantissa) if trim else mantissa}e{int(exponent)}"
    text = f"{value:,.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
    return _trimmed(text) if trim else text


def rate(value: float | None, unit: str) -> str:
    """A rate such as ``2,345 samples/s``; below 100 with three significant digits."""
    if value is None or not math.isfinite(value):
        return f"{UNKNOWN} {unit}/s"
    return f"{count(value) if abs(value) >= 100 else number(value, digits=3)} {unit}/s"


def duration(seconds: float | None) -> str:
    """Seconds as ``412 ms``, ``12.3 s``, ``4 min 05 s``, ``3 h 12 min`` or ``2 d 03 h``."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    seconds = max(0.0, seconds)
    if seconds == 0 or 1 <= round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms" if round(seconds * 1000) < 1000 else "1.0 s"
    if round(seconds) < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    if round(seconds / 60) < 48 * 60:
        hours, rest = divmod(round(seconds / 60), 60)
        return f"{hours} h {rest:02d} min"
    days, rest = divmod(round(seconds / 3600), 24)
    return f"{days} d {rest:02d} h"


def size(num_bytes: float) -> str:
    """Bytes in binary units: ``1536`` -> ``1.5 KiB``."""
    value, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{number(value, digits=3)} {units[0]}"


def printable(text: object) -> str:
    """``text`` on one line, without control characters: names come from the user and must not steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def _trimmed(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text
