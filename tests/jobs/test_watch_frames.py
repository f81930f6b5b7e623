"""What `opendeep watch` draws: frames of any width, and the page."""

import errno
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

import opendeep_jax
from opendeep_jax.cli.main import main
from opendeep_jax.config.load import load_recipe, to_json
from opendeep_jax.jobs.watch.terminal import frame, sparkline
from opendeep_jax.jobs.watch.watch import labels
from opendeep_jax.record.report import live_page
from opendeep_jax.record.run_view import RunView
from opendeep_jax.record.time_kinds import KINDS

SVG = "http://www.w3.org/2000/svg"  # a name, no link
BAD = "</td><script>alert(1)</script>\x1b[31m\ud800"


def write_run(workdir, lines=50, events=3, summary=False, name="tiny"):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(to_json(load_recipe("quickstart")).replace('"quickstart"', f'"{name}"', 1))

    def write(file, records):
        (workdir / file).write_text("".join(json.dumps(record) + "\n" for record in records))

    write("metrics.jsonl", (
        {"step": step, "tokens": step * 4096, "loss": 3 + 6 / step, "grad_norm": 1 + 1 / step, "learning_rate": 1e-3,
         "tokens_per_second": 8000.0 + step % 7, "step_seconds": 0.5, "mfu": 0.3, "expert_load_max_over_mean": 1.5}
        for step in range(1, lines + 1)
    ))  # fmt: skip
    write("evaluation.jsonl", (
        {"step": step, "tokens": step * 4096, "held_out_bits_per_byte": 2 + 1 / step} for step in range(10, lines, 10)
    ))  # fmt: skip
    write("experts.jsonl", [{"step": lines, "load": [[0.5, 1.0, 1.5, 1.0], [4.0, 0.0, 0.0, 0.0]]}])
    write("events.jsonl", (
        {"time": f"2026-11-22T12:00:{i:02}+00:00", "kind": "skipped", "step": i, "text": f"Skipped {i}. {BAD}"}
        for i in range(events)
    ))  # fmt: skip
    seconds = {"step": 75.0, "compile": 15.0, "data": 5.0, "checkpoint": 5.0}
    write("goodput.jsonl", [{"start": "a", "wall": 1e9, "step": lines, "first_step": 0, "seconds": seconds}])
    if summary:
        (workdir / "summary.json").write_text(json.dumps({"steps": 10**6}))


def looked(*workdirs):
    return [RunView(workdir, details=len(workdirs) == 1).refresh() for workdir in workdirs]


def drawn(runs, width, encoding="utf-8", **console):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    console = Console(file=stream, width=width, highlight=False, **console)
    console.print(frame(runs, labels(runs), console))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


# The terminal


@pytest.mark.parametrize("width", [20, 40, 79, 200])
@pytest.mark.parametrize("count", [1, 3, 20])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_frames_fit_any_width(tmp_path, width, count, encoding):
    for index in range(count):
        write_run(tmp_path / f"run_of_a_sweep_with_a_long_name_{index}", name="tiny, learning_rate=0.0003, seed=12345")
    text = drawn(looked(*sorted(tmp_path.iterdir())), width, encoding)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text and len(text.splitlines()) >= count


def test_a_frame_says_what_there_is_to_know(tmp_path):
    write_run(tmp_path)
    text = drawn(looked(tmp_path), 100)
    expected = ["tiny  running", "step 50/", "204.80K tokens", "3.120 nats/token", "2.025 bits/byte", "8,001 tokens/s",
                "MFU 30.0%", "16 × 256 tokens", "0.001, cosine", "busiest 1.50 × mean", "75.0%  ███",
                "compile 15.0%", "12:00:02  step 2  skipped  Skipped 2. </td>", " left", "  █"]  # fmt: skip
    assert [part for part in expected if part not in text] == []


def test_a_table_says_the_dearest_first(tmp_path):
    for name in "abc":
        write_run(tmp_path / name, summary=name == "b")
    runs = looked(*(tmp_path / name for name in "abc"))
    narrow, wide = drawn(runs, 40), drawn(runs, 160)
    assert re.search(r"a +running +\d+% +3.120", narrow) and "MFU" not in narrow
    assert "finished" in wide and "75.0%" in wide and "2.025" in wide and "8,001" in wide
    assert "step 2" in wide.splitlines()[4]


def test_long_names_in_a_table_still_tell_runs_apart(tmp_path):
    names = [f"learning_rate={rate},experts_per_token=4,seed={seed}" for rate in (0.001, 0.01) for seed in (0, 1)]
    for name in names:
        write_run(tmp_path / name)
    lines = drawn(looked(*(tmp_path / name for name in names)), 60).splitlines()[1:5]
    assert len({line.split()[0] for line in lines}) == 4, lines


def test_runs_of_nothing_make_a_frame(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    assert "nothing there yet" in drawn(looked(tmp_path / "a"), 80)
    assert drawn(looked(*(tmp_path / name for name in "abc")), 80).count("nothing th") == 3


def test_a_low_terminal_shows_the_runs_that_go_on(tmp_path):
    for index in range(30):
        write_run(tmp_path / f"run{index:02}", summary=index not in (3, 29), events=0)
    text = drawn(looked(*sorted(tmp_path.iterdir())), 100, height=20, force_terminal=True, color_system=None)
    assert "run03" in text and "run29" in text and "20 more" in text and len(text.splitlines()) <= 20


def test_a_loss_that_is_not_finite_is_said(tmp_path):
    for name in "abc":
        write_run(tmp_path / name)
        with open(tmp_path / name / "metrics.jsonl", "a") as file:
            file.write('{"step": 51, "loss": null, "non_finite": {"loss": "nan"}}\n')
    runs = looked(*(tmp_path / name for name in "abc"))
    assert "not finite" in drawn(runs[:1], 80) and drawn(runs, 80).count(" nan ") == 3


def test_sparklines_scale_and_cut_spikes():
    assert sparkline([], 10) == "" and sparkline([1.0], 0) == "" and sparkline([2.0, 2.0], 5) == "▁▁"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(list(range(80)), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([*range(39), 1e9], 40)[:39:6] == "▁▂▃▄▆▇█"
    assert sparkline([0, 1], 2, ascii_only=True).isascii()


# The page


class Document(HTMLParser):
    VOID = {"meta", "img", "br"}

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.links, self.texts = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        self.open += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_shows_everything_and_needs_nothing_else(tmp_path):
    write_run(tmp_path)
    page = live_page(looked(tmp_path), ["tiny"], every=2.0)
    document = Document(page)
    headings = ("Learning", "Speed", "Where the time went", "Data and schedule", "Experts", "What happened")
    assert [heading for heading in headings if heading not in document.texts] == []
    assert document.tags.count("svg") == 7 and document.tags.count("img") == 2 and all(
        link.startswith(("data:image/png;base64,", "#")) for link in document.links
    )  # fmt: skip
    style, _, script = page.partition("</style>")
    assert not re.search(r"(url\(|@import|https?://)", style) and "http" not in script[
        script.index("<script") :
    ].replace(SVG, "")
    assert document.tags.count("script") == 1 and "location.reload()" in page and "alert(1)</script>" not in page


def test_the_page_lays_runs_over_each_other(tmp_path):
    for name in "abc":
        write_run(tmp_path / name)
    runs = looked(*(tmp_path / name for name in "abc"))
    document = Document(page := live_page(runs, list("abc"), every=2.0))
    loss = re.search(r"<svg[^>]* data-chart=.*?</svg>", page, re.S)[0]
    assert [curve["name"] for curve in json.loads(unescape(re.search(r'data-chart="([^"]*)"', loss)[1]))["curves"]] == [
        *"abc"
    ]
    assert len(set(re.findall(r'<g data-run="\d">\s*<path [^>]*stroke: (var\(--s\d\))', loss))) == 3
    assert document.texts.count("75.0%") == 3 + 3 and document.tags.count("img") == 3


def test_a_page_of_finished_runs_rests(tmp_path):
    write_run(tmp_path, summary=True)
    page = live_page(looked(tmp_path), ["tiny"], every=2.0)
    assert "data-every=0>" in page and "refresh" not in page and "Nothing is left to wait for." in page


def test_a_page_of_nothing_is_a_page(tmp_path):
    assert "nothing there yet" in Document(live_page(looked(tmp_path), ["x"], every=2.0)).texts


@pytest.mark.parametrize("count", [8, 60])
def test_the_page_stays_small(tmp_path, count):
    write_run(tmp_path / "a", lines=5000, events=500)
    (run,) = looked(tmp_path / "a")
    page = live_page([run] * count, [f"run {index}" for index in range(count)], every=2.0)
    assert len(page.encode()) < 1e6


# The command


def test_the_command_prints_one_frame_and_writes_the_page(tmp_path, capsys):
    write_run(tmp_path / "run")
    page = tmp_path / "watch.html"
    assert main(["watch", f"--workdir={tmp_path}/run", "--once", f"--html={page}"]) == 0
    assert "tiny" in capsys.readouterr().out
    Document(page.read_text())
    assert main(["watch", f"--workdir={tmp_path}/run"]) == 0  # not on a terminal: one frame
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "watch.html"]


@pytest.mark.parametrize("arguments, said", [
    ([], "--workdir is missing"), (["--workdir=nowhere"], "there is no such directory"),
    (["--workdir=.", "--every=0"], "at least 0.1"), (["--workdir=.", "--every=nan"], "at least 0.1"),
    (["--workdir=.", "--html=no/such/page.html"], "a directory that exists"), (["--workdir=.", "--html=."], "--html=."),
    (["--workdir=.", "--htm=x"], "Did you mean --html?"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_a_paragraph(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["watch", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def _on_a_terminal(arguments, act):
    """Runs the watch on a terminal of its own, lets `act` do something once it has drawn; (status, what it wrote)."""
    process, terminal = pty.fork()
    if process == 0:
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "90", "LINES": "30"}
        os.execvpe(sys.executable, [sys.executable, "-m", "opendeep_jax.cli.main", "watch", *arguments], environment)
    seen, acted, deadline = b"", False, time.monotonic() + 20
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                piece = os.read(terminal, 65536)
            except OSError as error:
                assert error.errno == errno.EIO  # its end
                break
            if not piece:
                break
            seen += piece
        if not acted and b"goodput" in seen and b"step 50" in seen:
            act(process, terminal)
            acted = True
    else:
        os.kill(process, signal.SIGKILL)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), seen.decode("utf-8", "replace")


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # JAX's own, and the child becomes another program
@pytest.mark.parametrize("how", ["q", "ctrl-c"])
def test_the_live_watch_ends_cleanly(tmp_path, how):
    write_run(tmp_path)

    def act(process, terminal):
        os.write(terminal, b"q" if how == "q" else b"\x03")

    status, seen = _on_a_terminal([f"--workdir={tmp_path}", "--every=30"], act)
    assert status == 0 and "Traceback" not in seen
    assert "\x1b[?1049h" in seen and "\x1b[?1049l" in seen  # the screen was taken and given back
    assert seen.rindex("tiny") > seen.rindex("\x1b[?1049l")  # and the last frame stays


def test_without_a_terminal_the_page_is_kept_up_to_date_until_all_is_done(tmp_path):
    write_run(tmp_path / "run")
    page = tmp_path / "watch.html"
    command = [sys.executable, "-m", "opendeep_jax.cli.main", "watch", f"--workdir={tmp_path}/run", f"--html={page}"]
    with subprocess.Popen([*command, "--every=0.1"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == f"page: {page}\n"
            assert "<b>51</b>" not in page.read_text()
            with open(tmp_path / "run/metrics.jsonl", "a") as file:
                file.write('{"step": 51, "tokens": 208896, "loss": 3.111}\n')
            end = time.monotonic() + 60
            while "<b>51</b>" not in page.read_text() and time.monotonic() < end:
                time.sleep(0.05)
            assert "<b>51</b>" in page.read_text()
            (tmp_path / "run/summary.json").write_text('{"steps": 1000000}')
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert "Nothing is left to wait for." in page.read_text()


def test_the_frame_in_the_docs_has_the_lines_that_are_drawn(tmp_path):
    write_run(tmp_path)
    page = (Path(opendeep_jax.__file__).parent.parent / "docs/watching.md").read_text("utf-8")
    shown = re.search(r"^```text\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)[1]
    frames = [[line[:10].strip() for line in text.splitlines()] for text in (shown, drawn(looked(tmp_path), 100))]
    lines = ["loss", "held-out", "speed", "data", "rate", "experts", "goodput"]
    assert [[line for line in frame if line in lines] for frame in frames] == [lines, lines]
    assert max(map(len, shown.splitlines())) <= 100


def test_the_kinds_of_time_in_the_docs_are_those_there_are():
    page = (Path(opendeep_jax.__file__).parent.parent / "docs/watching.md").read_text("utf-8")
    table = page.partition("| kind | seconds of |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == list(KINDS)
