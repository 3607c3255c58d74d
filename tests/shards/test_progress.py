"""What long work says of itself where no terminal is: done, of how many, rate, time left."""

import pytest

from paml.shards.progress import Rate, duration, line_of, lines


def test_the_rate_counts_neither_an_earlier_run_nor_what_is_long_past() -> None:
    now = [0.0]
    rate = Rate(lambda: now[0])
    assert rate.update(900_000) is None  # found done at the start
    now[0] = 10.0
    assert rate.update(901_000) == pytest.approx(100.0)
    for _ in range(20):
        now[0] += 10.0
        last = rate.update(901_000 + int(now[0] - 10.0) * 7)
    assert last == pytest.approx(7.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (9540, "2 h 39 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line() -> None:
    assert line_of("images", 12_000, 1_743_042, 182.0) == (
        "images: 12,000 of 1,743,042 (0.7 %), 182.0/s, 2 h 38 min left"
    )
    assert line_of("shards", 0, 0, None) == "shards: 0 of 0 (0.0 %)"


def test_lines_come_at_most_every_ten_seconds() -> None:
    now, said = [100.0], []
    show = lines(said.append, lambda: now[0])
    for second in range(31):
        now[0] = 100.0 + second
        show("images", 5 * second, 1000)
    assert [line.split(" (")[0] for line in said] == [f"images: {5 * s} of 1,000" for s in (10, 20, 30)]
    assert "5.0/s, 2 min 50 s left" in said[-1]
