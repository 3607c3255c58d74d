"""Progress lines: done, total, rate and time left."""

import pytest

from paml.progress import format_duration, format_progress, log_progress


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (9540, "2 h 39 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_format_progress() -> None:
    assert format_progress("images", 12_000, 1_743_042, 182.0) == (
        "images: 12,000 of 1,743,042 (0.7 %), 182.0/s, 2 h 38 min left"
    )
    assert format_progress("shards", 0, 0, None) == "shards: 0 of 0 (0.0 %)"


def test_at_most_one_line_every_ten_seconds() -> None:
    now, logged = [100.0], []
    show = log_progress(logged.append, lambda: now[0])
    for second in range(31):
        now[0] = 100.0 + second
        show("images", 900 + 5 * second, 2000)  # an earlier run did 900
    assert [line.split(" (")[0] for line in logged] == [f"images: {900 + 5 * s:,} of 2,000" for s in (10, 20, 30)]
    assert "5.0/s, 3 min 10 s left" in logged[-1]
