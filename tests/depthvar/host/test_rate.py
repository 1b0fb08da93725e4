import pytest

from depthvar.host.rate import duration, rate_text


@pytest.mark.parametrize(
    ("per_second", "text"),
    [
        (0, "0"),
        (1 / 48, "0.0208"),
        (1 / 3600, "0.000278"),
        (0.1, "0.1"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (99.96, "100"),
        (1234.5, "1,234"),
    ],
)
def test_a_rate_keeps_three_digits_however_slow(per_second: float, text: str):
    assert rate_text(per_second) == text


def test_durations_are_short():
    assert [duration(s) for s in (4.23, 200, 7500)] == ["4.2 s", "3 min 20 s", "2 h 5 min"]
