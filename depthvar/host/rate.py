"""How rates and times are written: slow rates too, `1,234`, `12.3` and `0.0208`, never `0.0`."""

from __future__ import annotations


def rate_text(per_second: float) -> str:
    """Three significant digits, whole numbers from 100 on."""
    return f"{per_second:,.0f}" if per_second >= 99.95 else f"{per_second:.3g}"


def duration(seconds: float) -> str:
    """`2 h 5 min`, `3 min 20 s` or `4.2 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
