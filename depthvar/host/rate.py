"""How a rate is written, slow ones too: `1,234`, `12.3` and `0.0208` images/s, never `0.0`."""

from __future__ import annotations


def rate_text(per_second: float) -> str:
    """Three significant digits, whole numbers from 100 on."""
    return f"{per_second:,.0f}" if per_second >= 99.95 else f"{per_second:.3g}"
