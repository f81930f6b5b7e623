import io
import time

import pytest

from opendeep_jax.display.numbers import human_bytes, human_count, human_dollars, human_time
from opendeep_jax.display.progress import ProgressLine
from opendeep_jax.display.tables import key_value_table


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def _run(stream, steps=1000, start=0, every=1):
    with ProgressLine(steps, start, stream) as progress:
        for step in range(start + 1, steps + 1):
            numbers = (
                {"loss": 9.0 - step / steps, "tokens_per_second": 2400.0, "mfu": 0.312} if step % every == 0 else {}
            )
            progress.update(step, **numbers)
        progress.message("the end")
    return stream.getvalue()


@pytest.mark.parametrize(("steps", "start", "every"), [(1000, 0, 10), (1000, 990, 1), (7, 0, 1), (100_000, 3, 1000)])
def test_a_log_file_gets_a_few_aligned_lines(steps, start, every):
    *lines, last = _run(io.StringIO(), steps, start, every).splitlines()
    assert last == "the end"
    assert 1 <= len(lines) <= 41
    assert f"{steps:,}/{steps:,} 100.0%" in lines[-1] and "2,400 tokens/s" in lines[-1]
    assert len({line.index("loss") for line in lines}) == 1
    assert len({line.index("tokens/s") for line in lines}) == 1


def test_the_held_out_number_stays_on_the_line():
    stream = io.StringIO()
    with ProgressLine(10, stream=stream) as progress:
        progress.update(1, loss=5.0, held_out_bits_per_byte=2.25)
        progress.update(2, loss=4.0)
    assert stream.getvalue().splitlines()[-1].count("2.250 bits/byte") == 1


@pytest.mark.parametrize("columns", ["20", "60", "80", "200"])
def test_the_live_line_fits_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm-256color")
    progress = ProgressLine(1000, stream=Terminal())
    progress.update(500, loss=3.2, held_out_bits_per_byte=2.0, tokens_per_second=2e4, mfu=0.3)
    line = progress._live_line()
    assert len(line) < int(columns) and line.startswith(" 50%")
    assert ("MFU" in line) == (columns == "200")


def test_a_terminal_shows_messages_without_their_escape_sequences(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with ProgressLine(10, stream=stream) as progress:
        progress.update(1, loss=2.0)
        progress.message("red \x1b[31mtext [bold]x[/bold]")
    assert "red �[31mtext [bold]x[/bold]" in stream.getvalue()


def test_a_closed_stream_does_not_end_the_run():
    stream = io.StringIO()
    progress = ProgressLine(10, stream=stream)
    stream.close()
    with progress:
        progress.update(1, loss=1.0)
        progress.message("gone")


def test_an_ascii_stream_gets_what_it_can_hold():
    raw = io.BytesIO()
    with ProgressLine(3, stream=io.TextIOWrapper(raw, encoding="ascii")) as progress:
        progress.message("naïve 模型")
    assert raw.getvalue() == b"na?ve ??\n"


def test_an_update_costs_microseconds(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    with ProgressLine(10**9, stream=Terminal()) as progress:
        start = time.perf_counter()
        for step in range(5000):
            progress.update(step, loss=1.0)
        assert (time.perf_counter() - start) / 5000 < 50e-6


def test_the_summary_aligns_its_columns():
    rows = [("Model", ""), ("parameters", "15.83M"), ("active", "5.21M"), ("Data", ""), ("tokens", "6M\nof text")]
    assert key_value_table(rows) == (
        "Model\n  parameters  15.83M\n  active      5.21M\n\nData\n  tokens      6M\n              of text"
    )


@pytest.mark.parametrize(
    ("form", "number", "text"),
    [
        (human_count, 671.03e9, "671.03B"), (human_count, 8192, "8,192"), (human_count, 0, "0"),
        (human_count, 999_999, "1.00M"), (human_count, 15_825_920, "15.83M"), (human_count, 14.8e12, "14.80T"),
        (human_count, float("nan"), "nan"), (human_bytes, 2**31, "2.00 GiB"), (human_bytes, 512, "512 B"),
        (human_bytes, 2**20 - 1, "1.00 MiB"), (human_time, 8.7, "8.7 s"), (human_time, 59.99, "1 min 00 s"),
        (human_time, 200, "3 min 20 s"), (human_time, 7500, "2 h 05 min"), (human_time, 4_676_400, "54 d 3 h"),
        (human_time, float("inf"), "inf"), (human_time, 0.0123, "12.3 ms"), (human_time, 0, "0.0 s"),
        (human_time, 7.4e-5, "74 µs"), (human_time, 0.9999, "1 s"),  (human_bytes, 8192, "8.00 KiB"),
        (human_dollars, 5.576e6, "$5.58M"),
        (human_dollars, 0.42, "$0.42"),
    ],
)  # fmt: skip
def test_numbers_read_well(form, number, text):
    assert form(number) == text
