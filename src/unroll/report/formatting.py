"""Numbers as people read them, enough digits to compare and no more; and text that is safe to show."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

NOTHING = "–"

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff\ud800-\udfff]"
)
_OF_A_HUNDRED = ("BLEU", "chrF", "TER", "%")


def clean(value: Any) -> Any:
    """A JSON value whose strings are safe to write as UTF-8, to stand in XML and to show."""
    if isinstance(value, str):
        return _UNSAFE.sub("\ufffd", value.replace("\r\n", "\n"))
    if isinstance(value, dict):
        return {clean(key): clean(entry) for key, entry in value.items()}
    return [clean(entry) for entry in value] if isinstance(value, list) else value


def decimals(values: Iterable[float], unit: str = "") -> int:
    """Digits after the point for a column of scores, the same for all: four below 10, two below 100, one above.

    Scores out of a hundred (BLEU and its like) have two, however small.
    """
    if unit.startswith(_OF_A_HUNDRED):
        return 2
    finite = [abs(value) for value in values if math.isfinite(value)]
    least = min(finite, default=0.0)
    return 4 if least < 10 else 2 if least < 100 else 1


def fixed(value: float | None, digits: int) -> str:
    """`value` with that many digits after the point; two significant ones where those would all be 0."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    small = digits > 2 and 0 < abs(value) < 5 * 10**-digits
    return (f"{value:.2g}" if small else f"{value:,.{digits}f}").replace("-", "−")


def interval(low: float | None, high: float | None, digits: int) -> str:
    """`[low, high]`, or nothing where there is no interval."""
    return "" if low is None or high is None else f"[{fixed(low, digits)}, {fixed(high, digits)}]"


def scaled(value: float | None) -> str:
    """Three significant digits with a metric prefix: 3,214,567 is `3.21 M`."""
    if value is None or not math.isfinite(value):
        return NOTHING
    rounded = float(f"{value:.3g}")
    for factor, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(rounded) >= factor:
            return f"{_three(rounded / factor)}{prefix}"
    return f"{value:.0f}" if value == int(value) else _three(rounded)


def minutes(value: float | None) -> str:
    """Minutes to one digit; what is shorter is not called nothing."""
    if value is None:
        return NOTHING
    return "< 0.1" if value < 0.05 else fixed(value, 1 if value < 100 else 0)


def p_value(value: float) -> str:
    """A p-value: three digits, or that it is below a thousandth."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def seeds(count: int, mean: float | None, deviation: float | None, best: float | None, digits: int) -> str:
    """How many seeds; of several the mean and the standard deviation over them, and the best one, called so."""
    if count < 2 or mean is None or deviation is None:
        return str(count)
    spread = f"{count}: {fixed(mean, digits)} ± {fixed(deviation, digits)}"
    return spread if best is None else f"{spread}, best of {count} {fixed(best, digits)}"


def _three(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"
