"""The speed that MFU is measured against is the machine's, whatever else the machine is doing."""

import json

import pytest

from opendeep_jax.train import cpu_peak

FLOP = {size: 2 * size**3 for size in cpu_peak.SIZES}


@pytest.fixture
def clock(monkeypatch):
    """A clock on which each matmul takes what the test's function says, called with the number of the try."""
    now, tries = [0.0], [0]

    class Product:
        def __init__(self, seconds):
            self.seconds = seconds

        def block_until_ready(self):
            now[0] += self.seconds

    def put(seconds):
        def product(x, _):
            tries[0] += 1
            return Product(seconds(tries[0]) * FLOP[len(x)] / 1e11)

        monkeypatch.setattr(cpu_peak.jax, "jit", lambda _: product)
        monkeypatch.setattr(cpu_peak.time, "perf_counter", lambda: now[0])
        return tries

    return put


@pytest.mark.parametrize(
    "disturbed",
    [
        lambda n: 1.0,
        lambda n: 4.0 if n < 12 else 1.0,  # the machine is busy when the run starts
        lambda n: 1.0 if n % 7 == 0 else 3.0 + n % 3,  # others take most of its time
        lambda n: 1.0 if n == 13 else 6.0,
    ],
)
def test_the_speed_is_that_of_the_tries_that_nobody_disturbed(clock, disturbed):
    clock(disturbed)
    assert cpu_peak.measured_matmul() == pytest.approx(1e11, rel=0.03)


def test_a_slow_machine_is_measured_once_and_for_a_limited_time(clock):
    tries = clock(lambda n: 1000.0)
    assert cpu_peak.measured_matmul() == pytest.approx(1e8, rel=0.03)
    assert tries[0] == 2 * len(FLOP)  # the first of each is compiling


def test_the_best_of_a_kind_of_machine_is_kept(monkeypatch, tmp_path):
    speeds, lengths = iter([3e10, 8e10, 2e10, 5e10]), []
    monkeypatch.setattr(cpu_peak, "_measured_here", lambda seconds: lengths.append(seconds) or next(speeds))
    cache = str(tmp_path / "cache")
    assert [cpu_peak.cpu_peak(cache) for _ in range(3)] == [3e10, 8e10, 8e10]
    monkeypatch.setattr(cpu_peak, "machine_kind", lambda: "another")
    assert cpu_peak.cpu_peak(cache) == 5e10
    assert lengths == [cpu_peak.FIRST_SECONDS, cpu_peak.SECONDS, cpu_peak.SECONDS, cpu_peak.FIRST_SECONDS]
    assert sorted(json.loads((tmp_path / "cache" / cpu_peak.PEAK_FILE).read_text()).values()) == [5e10, 8e10]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": "b"}', '{"a": null}', '{"a": [1]}', "5"])
def test_a_record_that_cannot_be_read_is_made_anew(monkeypatch, tmp_path, content):
    monkeypatch.setattr(cpu_peak, "_measured_here", lambda _: 3e10)
    (tmp_path / cpu_peak.PEAK_FILE).write_text(content)
    assert cpu_peak.cpu_peak(str(tmp_path)) == 3e10
    assert cpu_peak.machine_kind() in json.loads((tmp_path / cpu_peak.PEAK_FILE).read_text())


def test_without_a_place_to_keep_it_the_speed_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_peak, "_measured_here", lambda _: 3e10)
    (tmp_path / "file").touch()
    assert cpu_peak.cpu_peak("") == cpu_peak.cpu_peak(str(tmp_path / "file")) == 3e10
