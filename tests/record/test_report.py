import json
import re
import threading
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from opendeep_jax.record.events import record_event
from opendeep_jax.record.goodput import GoodputClock
from opendeep_jax.record.metrics import MetricsWriter
from opendeep_jax.record.record import Record
from opendeep_jax.record.report import write_report
from opendeep_jax.record.report_experts import routing
from opendeep_jax.record.run_view import RunView

SUMMARY = {
    "steps": 60, "tokens": 6000, "seconds": 61.0, "final_loss": 3.123, "held_out_bits_per_byte": 1.9,
    "gzip_bits_per_byte": 2.1, "xz_bits_per_byte": 1.7, "tokens_per_second": 98.0, "parameters": 10_200_000,
    "active_parameters": 6_000_000, "peak_memory_bytes": 2**31, "first_step_seconds": 7.25,
}  # fmt: skip


def _write_run(workdir, steps=60, layers=2, experts=4, loss=None):
    writer = MetricsWriter(Record(workdir))
    for step in range(1, steps + 1):
        scalars = {
            "step": step, "tokens": step * 100, "loss": 9 / step if loss is None else loss(step), "lm_loss": 8 / step,
            "mtp_loss": 1 / step, "balance_loss": 1e-4, "grad_norm": 1.0 + 1 / step, "learning_rate": 1e-3,
            "tokens_per_second": 98.0, "step_seconds": 1.0, "mfu": 0.3, "expert_load_max_over_mean": 1.5,
            "router_bias_min": -step / 1000, "router_bias_max": step / 1000,
        }  # fmt: skip
        writer.scalars(scalars)
        if step % 10 == 0:
            load = np.arange(1, experts + 1) + np.zeros((layers, 1))
            writer.experts(step, load, (load - load.mean()) * step / 1000)
            writer.evaluation({"step": step, "tokens": step * 100, "held_out_bits_per_byte": 1.9 + 1 / step})
            writer.sample(step, "def <main>(", f"</pre><script>alert({step})</script>\x1b[31m\ud800")
    writer.close()


def _finish_run(workdir):
    (workdir / "summary.json").write_text(json.dumps(SUMMARY))
    config = {
        "name": "tiny & quick",
        "seed": 0,
        "train": {"steps": 60},
        "model": {"num_dense_layers": 1, "num_layers": 3, "moe": {"num_experts": 4}},
    }
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "config_diff.txt").write_text("optimizer.learning_rate: 0.0003 -> 0.001\n")


class _Page(HTMLParser):
    """Collects what the tests ask about, and checks that elements close."""

    VOID = {"meta", "img", "br"}

    def __init__(self, path):
        super().__init__()
        self.tags, self.ids, self.links, self.open, self.texts = [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[name] for name in ("src", "href", "xlink:href") if name in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open = self.open[:-1] if tag not in self.VOID else self.open

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


@pytest.fixture
def finished(tmp_path):
    _write_run(tmp_path)
    _finish_run(tmp_path)
    return tmp_path


def test_the_report_shows_every_part_of_a_finished_run(finished):
    path = write_report(finished)
    assert path == finished / "report.html"
    page = _Page(path)
    headings = ("Learning", "Speed", "Experts", "What it writes", "Configuration", "Record")
    assert all(heading in page.texts for heading in headings)
    expected = ["tiny & quick", "Finished after 60 steps.", "3.123", "10.20M", "2.00 GiB", "1 min 01 s", "gzip\u00a0-9"]
    expected += ["first_step_seconds", "7.25", "model.moe.num_experts".removeprefix("model."), "0.0003 -> 0.001"]
    assert [text for text in expected if text not in page.text] == []
    assert page.tags.count("img") == 2 and {"Layer 1", "Layer 2"} <= set(page.texts)
    assert page.tags.count("svg") == 4 + 2 + 2 + 2


def test_the_verdict_says_which_compressor_is_beaten(finished):
    verdict = _Page(write_report(finished)).text
    assert "1.900 bits per byte, fewer than gzip\u00a0-9, not yet fewer than xz\u00a0-9." in verdict


def test_the_report_needs_nothing_but_itself(finished):
    page = _Page(write_report(finished))
    assert page.links and all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert not {"link", "iframe"} & set(page.tags) and page.tags.count("script") == 1
    style = (finished / "report.html").read_text()
    assert "url(http" not in style and "@import" not in style


def test_ids_are_unique_and_references_find_them(finished):
    page = _Page(write_report(finished))
    assert len(page.ids) == len(set(page.ids))
    references = re.findall(r"(?:url\(|href=\")#([^)\"]+)", (finished / "report.html").read_text())
    assert references and set(references) <= set(page.ids)


def test_charts_take_their_colors_from_the_theme(finished):
    svgs = re.findall(r"<svg.*?</svg>", write_report(finished).read_text(), re.S)
    assert svgs and all("var(--muted)" in svg and "var(--grid)" in svg for svg in svgs)
    assert not any(fixed in svg for svg in svgs for fixed in ("#ffffff", "#000000", "#20242a", "#6a7280", "#e4e6ea"))


def test_mfu_is_the_same_number_in_tile_and_chart(finished):
    page = _Page(write_report(finished))
    assert "median MFU 30.0%" in page.texts and "median 30.0%" in page.texts
    (chart,) = [svg for svg in re.findall(r"<svg.*?</svg>", (finished / "report.html").read_text(), re.S)
                if 'aria-label="MFU' in svg]  # fmt: skip
    assert re.search(r">\d+%</text>", chart) and not re.search(r">0\.\d+</text>", chart)


def test_hostile_samples_stay_text(finished):
    page = _Page(write_report(finished))
    assert page.tags.count("script") == 1  # its own
    assert "</pre><script>alert(60)</script>�[31m�" in page.text


def test_the_picture_is_a_png(finished):
    write_report(finished)
    data = (finished / "loss.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 10_000


def test_the_same_files_give_the_same_report(finished):
    first = [write_report(finished).read_bytes(), (finished / "loss.png").read_bytes()]
    assert first == [write_report(finished).read_bytes(), (finished / "loss.png").read_bytes()]


def test_nothing_is_left_beside_the_report(finished):
    before = {path.name for path in finished.iterdir()}
    write_report(finished)
    assert {path.name for path in finished.iterdir()} - before == {"report.html", "loss.png"}


@pytest.mark.parametrize("steps", [0, 1, 2, 12])
def test_a_run_that_has_just_begun_gives_a_report(tmp_path, steps):
    _write_run(tmp_path, steps=steps)
    page = _Page(write_report(tmp_path))
    assert f"Not finished: the last logged step is {steps}." in page.texts
    assert ("Learning" in page.texts) == (steps > 0)
    assert (tmp_path / "loss.png").exists()


def test_a_run_that_died_in_the_middle_of_a_line_gives_a_report(finished):
    (finished / "summary.json").write_text('{"steps": 6')
    (finished / "config.json").write_text("")
    for path in finished.glob("*.jsonl"):
        path.write_bytes(path.read_bytes()[:-7])
    page = _Page(write_report(finished))
    assert "Not finished: the last logged step is 59." in page.texts and finished.name in page.texts


def test_a_run_that_goes_on_after_its_summary_is_not_finished(finished):
    (finished / "summary.json").write_text(json.dumps(SUMMARY | {"steps": 40}))
    assert "Not finished: the last logged step is 60 of 60." in _Page(write_report(finished)).texts


def test_numbers_that_are_not_finite_are_announced(tmp_path):
    _write_run(tmp_path, loss=lambda step: float("nan") if step > 50 else 3.0)
    page = _Page(write_report(tmp_path))
    assert "10 logged lines have numbers that are not finite. The first, at step 51: loss was nan." in page.texts


def test_a_dense_run_has_no_expert_section(tmp_path):
    writer = MetricsWriter(Record(tmp_path))
    for step in (1, 2, 3):
        writer.scalars({"step": step, "loss": 3.0 / step, "mtp_loss": 0.0})
    writer.close()
    page = _Page(write_report(tmp_path))
    assert "Experts" not in page.texts and "multi-token prediction" not in page.texts
    assert "step" in page.texts and "tokens trained" not in page.texts


def test_the_report_says_where_the_time_went(finished):
    begun = time.perf_counter() - 100
    clock = GoodputClock(Record(finished), begun)
    clock.default = "step"
    clock.seconds |= {"start": 10.0, "step": 70.0, "compile": 19.0, "checkpoint": 0.0}
    clock.write(60)
    with open(finished / "goodput.jsonl", "a") as file:
        file.write("{half a li")
    page = _Page(write_report(finished))
    assert "Where the time went" in page.texts and "over one start." in page.text
    assert {"step", "compile", "start"} <= set(page.texts) and "checkpoint" not in page.texts
    assert "19.0 s" in page.texts and "70.7% of 1 min 39 s" in page.text


def test_events_are_shown_newest_first_and_counted(finished):
    for step in range(1, 61):
        record_event(finished, "skipped", step, f"The update of step {step} was <b>skipped</b>.")
    page = _Page(write_report(finished))
    shown = [text for text in page.texts if text.startswith("The update of step ")]
    assert len(shown) == 40 and shown[0].startswith("The update of step 60 was <b>skipped") and "b" in page.tags
    assert "20 earlier ones are in events.jsonl." in page.texts


def test_events_of_odd_shapes_are_shown_as_they_are(finished):
    odd = [{}, {"time": 3, "kind": None, "step": "x", "text": ["a", 1]}, {"text": "\x1b[2J</td>"}]
    (finished / "events.jsonl").write_text("\n".join(map(json.dumps, odd)) + '\n{"ti')
    page = _Page(write_report(finished))
    assert "What happened" in page.texts and "�[2J</td>" in page.texts


def test_two_thousand_lines_take_seconds(tmp_path):
    _write_run(tmp_path, steps=2000)
    start = time.perf_counter()
    write_report(tmp_path)
    assert time.perf_counter() - start < 8  # one to two on a quiet machine
    assert (tmp_path / "report.html").stat().st_size < 2e6


def test_reports_can_be_written_from_several_threads(tmp_path):
    names = ["a", "b"]
    for name in names:
        (tmp_path / name).mkdir()
        _write_run(tmp_path / name, steps=20)
    threads = [threading.Thread(target=write_report, args=(tmp_path / name,)) for name in names]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    written = [(tmp_path / name / "report.html").read_text() for name in names]
    assert written[0].replace(">a<", ">b<").replace(">a:", ">b:") == written[1]


def test_routing_is_placed_in_tokens_and_other_shapes_are_left_out(tmp_path):
    _write_run(tmp_path, steps=20)
    with open(tmp_path / "experts.jsonl", "a") as file:
        file.write('{"step": 12, "load": [[1, 2], [1, 1, 1]]}\n{"step": 15, "load": [[1, null, 1, 1], [1, 1, 1, 1]]}\n')
    tokens, load = routing(RunView(tmp_path, details=True).refresh(), "load")
    assert tokens.tolist() == [1000, 2000, 1500] and load.shape == (3, 2, 4)
    assert np.isnan(load[2, 0, 1]) and load[0, 0].tolist() == [0.4, 0.8, 1.2, 1.6]
