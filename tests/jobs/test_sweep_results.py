import csv
import dataclasses
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from small_models import run_config

import opendeep_jax
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_recipe
from opendeep_jax.config.schedule import tokens_before
from opendeep_jax.config.schema import RampStage
from opendeep_jax.display.tables import latex_text, markdown_table
from opendeep_jax.jobs.sweep.plan import check, plan_sweep, read_sweep, save
from opendeep_jax.jobs.sweep.plots import axes_figure, compute_figure, curves_figure, write_pictures
from opendeep_jax.jobs.sweep.results import (
    best_summary,
    mean_text,
    ranked,
    rows,
    training_flops,
)
from opendeep_jax.jobs.sweep.run import report
from opendeep_jax.models.accounting import flops_per_token
from opendeep_jax.record.record import to_json_line

ROOT = Path(opendeep_jax.__file__).parent.parent
SETTINGS = {"optimizer.learning_rate": "1e-4,1e-3,1e-2", "model.moe.experts_per_token": "1,2"}


def _sweep(directory, settings=SETTINGS, base=None, **more):
    base = base or dataclasses.replace(run_config(), name="small")
    return plan_sweep(directory, base, settings, **{"seeds": 2} | more)


def _begin(sweep):
    tried, runs = check(sweep)
    save(sweep, tried, runs)
    return runs


def _finish(run, bits, **more):
    run.workdir.mkdir(parents=True, exist_ok=True)
    summary = {"steps": 10, "tokens": 1280, "final_loss": 2 * bits, "held_out_bits_per_byte": bits, "parameters": 5}
    (run.workdir / "summary.json").write_text(json.dumps(summary | more))
    lines = (to_json_line({"step": step, "tokens": step * 128, "lm_loss": bits + 1 / step}) for step in range(1, 11))
    (run.workdir / "metrics.jsonl").write_text("".join(lines))


def test_a_table_has_mean_spread_and_rank_over_the_seeds(tmp_path, capsys):
    sweep = _sweep(tmp_path)
    runs = _begin(sweep)
    for index, run in enumerate(runs):
        _finish(run, bits=2.0 + abs(index // 2 - 2) / 10 + 0.01 * (index % 2))
    table = report(sweep, runs)
    assert mean_text(ranked(table)[0]) == "2.0050 ± 0.0071 (n=2)"
    assert ranked(table)[0].config.optimizer.learning_rate == 1e-3
    said = capsys.readouterr().out
    assert "learning_rate=0.001, experts_per_token=1, held-out bits/byte 2.0050 ± 0.0071 (n=2)" in said
    assert "more than the seeds' spread" in said
    records = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert len(records) == 12 and records[0]["optimizer.learning_rate"] == "0.0001" and records[1]["seed"] == "1"
    assert float(records[4]["held_out_bits_per_byte"]) == 2.0
    page = (tmp_path / "results.md").read_text()
    assert "| 1 | 0.001 | 1 | 2.0050 ± 0.0071 (n=2) |" in page
    for name in ("axes.png", "compute.png", "curves.png"):
        assert f"]({name})" in page and matplotlib.image.imread(tmp_path / name).std() > 0.01


def test_the_best_is_a_recipe_that_loads(tmp_path):
    sweep = _sweep(tmp_path)
    runs = _begin(sweep)
    for index, run in enumerate(runs):
        _finish(run, bits=3.0 - index / 10)
    report(sweep, runs)
    best = load_recipe(str(tmp_path / "best.py"))
    assert (best.optimizer.learning_rate, best.model.moe.experts_per_token, best.seed) == (1e-2, 2, 0)
    assert dataclasses.replace(best, name=runs[-2].config.name) == runs[-2].config


def test_a_diverged_or_failed_run_is_shown_and_its_combination_never_best(tmp_path, capsys):
    sweep = _sweep(tmp_path)
    runs = _begin(sweep)
    for index, run in enumerate(runs):
        _finish(run, bits=1.0 + index)
    _finish(runs[0], bits=0.1, final_loss=None)  # what a NaN becomes in JSON
    (runs[2].workdir / "summary.json").unlink()
    runs[2].sibling_file(".failed").write_text("exit status 3\nThe replica on host a|b deviates.")
    table = report(sweep, runs)
    assert ranked(table)[0].config.optimizer.learning_rate == 1e-3
    page = (tmp_path / "results.md").read_text()
    assert "1 diverged, 1 finished" in page and "1 failed, 1 finished" in page and "host a|b deviates" in page
    assert "2.0000 (n=1 of 2)" in capsys.readouterr().out


def test_a_lead_within_the_spread_of_the_seeds_is_called_that(tmp_path):
    sweep = _sweep(tmp_path, {"optimizer.learning_rate": "1e-4,1e-3"})
    runs = _begin(sweep)
    for run, bits in zip(runs, (2.0, 2.2, 2.05, 2.25), strict=True):
        _finish(run, bits)
    assert "only 0.05, within the seeds' spread of 0.14" in best_summary(rows(runs, sweep.metric), sweep)


def test_one_seed_says_nothing_of_the_spread(tmp_path):
    sweep = _sweep(tmp_path, {"optimizer.learning_rate": "1e-4,1e-3"}, seeds=1)
    runs = _begin(sweep)
    for run in runs:
        _finish(run, 2.0)
    assert "says nothing of the spread (--seeds=3)" in best_summary(rows(runs, sweep.metric), sweep)


def test_without_any_result_there_is_a_table_and_no_best(tmp_path, capsys):
    sweep = _sweep(tmp_path)
    report(sweep, _begin(sweep))
    assert "No combination has all its results yet." in capsys.readouterr().out
    assert not (tmp_path / "best.py").exists() and not (tmp_path / "axes.png").exists()


def test_flops_are_those_of_every_step_also_under_a_batch_ramp():
    base = run_config()
    assert training_flops(base) == tokens_before(base, 10) * flops_per_token(base.model, 16).total
    ramp = dataclasses.replace(base.train, batch_ramp=(RampStage(batch_size=8, tokens=300),), batch_size=16)
    ramped = dataclasses.replace(base, train=ramp)
    assert training_flops(ramped) == tokens_before(ramped, 10) * flops_per_token(base.model, 16).total


def _measured(tmp_path, settings=SETTINGS, **more):
    sweep = _sweep(tmp_path, settings, **more)
    runs = _begin(sweep)
    for index, run in enumerate(runs):
        _finish(run, bits=2.0 + index // sweep.seeds / 10 + 0.01 * (index % sweep.seeds))
    return sweep, runs


def test_pictures_come_for_pages_and_for_papers_too(tmp_path):
    sweep, runs = _measured(tmp_path, {"optimizer.learning_rate": "1e-4,1e-3"})
    table = rows(runs, sweep.metric)
    assert write_pictures(sweep, table) == ["axes.png", "compute.png", "curves.png"]
    for name in ("axes", "compute", "curves"):
        svg = ElementTree.parse(tmp_path / f"{name}.svg").getroot()
        assert svg.tag.endswith("svg") and any(element.tag.endswith("text") for element in svg.iter())
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF-")
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.*g")}
    write_pictures(sweep, table)
    assert first == {name: (tmp_path / name).read_bytes() for name in first}


def test_a_figure_shows_every_combination_with_its_own_look_and_the_spread_of_its_seeds(tmp_path):
    sweep, runs = _measured(tmp_path, SETTINGS | {"optimizer.learning_rate": "1e-4,3e-4,1e-3,3e-3,1e-2"})
    rate, experts = (part.axes[0] for part in axes_figure(sweep, rows(runs, sweep.metric)).subfigs)
    for panel in (rate, experts):
        assert len(panel.containers) == 10 and all(bar.has_yerr for bar in panel.containers)  # the error bars
        assert "mean of 2 seeds, bars: standard deviation" in panel.get_title(loc="left")
        assert len(panel.figure.legends) == 1 and not panel.get_legend()
    assert len({line.get_color() for line in experts.lines}) == 5
    assert "(log scale)" in rate.get_xlabel() and "(log scale)" not in experts.get_xlabel()


def test_curves_name_every_rank_beside_the_axes(tmp_path):
    sweep, runs = _measured(tmp_path, SETTINGS | {"optimizer.learning_rate": "1e-4,3e-4,1e-3,3e-3,1e-2"})
    figure = curves_figure(sweep, rows(runs, sweep.metric))
    FigureCanvasAgg(figure).draw()
    panel, (legend,) = figure.axes[0], figure.legends
    ranks = {text.get_text(): text.get_window_extent() for text in panel.texts}
    assert set(ranks) == {str(rank) for rank in range(1, 11)}
    assert all(box.x0 >= panel.get_window_extent().x1 for box in ranks.values())
    heights = sorted((box.y0, box.y1) for box in ranks.values())
    assert all(below[1] <= above[0] + 3 for below, above in zip(heights, heights[1:], strict=False))
    looks = {(line.get_color(), str(line._dash_pattern)) for line in panel.lines}
    assert len(looks) == 10 and not panel.get_window_extent().overlaps(legend.get_window_extent())
    assert [text.get_text().split(":")[0] for text in legend.get_texts()] == [str(rank) for rank in range(1, 11)]


@pytest.mark.parametrize("seeds, left_out, said", [(1, False, "one seed"), (2, True, "hollow: 1 without result")])
def test_a_figure_says_what_its_points_are_means_of(tmp_path, seeds, left_out, said):
    sweep, runs = _measured(tmp_path, seeds=seeds)
    if left_out:
        (runs[0].workdir / "summary.json").unlink()
    table = rows(runs, sweep.metric)
    for figure in (axes_figure(sweep, table), compute_figure(sweep, table)):
        panel = (figure.subfigs[0] if figure.subfigs else figure).axes[0]
        assert said in panel.get_title(loc="left")
    (panel,) = axes_figure(sweep, table).subfigs[0].axes
    assert [line.get_markerfacecolor() for line in panel.lines].count("white") == left_out


@pytest.mark.parametrize("text, written", [
    ("learning_rate", r"learning\_rate"), ("50% & more #1 $x {y}", r"50\% \& more \#1 \$x \{y\}"),
    ("a\\b~c^d", r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d"), ("2.1 ± 0.2", r"2.1 $\pm$ 0.2"),
    ("1.2e+08", r"$1.2\times10^{8}$"), ("1e-05", r"$1\times10^{-5}$"), ("a---b", "a-{}-{}-b"), ("-", "-"),
    ("<a|b>", r"\textless{}a\textbar{}b\textgreater{}"), ("two\nlines", "two lines"), ("[x]", "{[}x{]}"),
])  # fmt: skip
def test_latex_prints_what_a_cell_says(text, written):
    assert latex_text(text) == written


def test_the_table_is_latex_of_booktabs(tmp_path):
    sweep, runs = _measured(tmp_path)
    report(sweep, runs)
    text = (tmp_path / "results.tex").read_text()
    assert r"\begin{tabular}{rrrrrrl}" in text and text.endswith("\\end{tabular}\n")
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 1 + 6 and {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {6}
    assert r"1 & 0.0001 & 1 & 2.0050 $\pm$ 0.0071 (n=2) & " in text and r"learning\_rate" in lines[0]
    assert [rule for rule in re.findall(r"\\(\w+rule)", text)] == ["toprule", "midrule", "bottomrule"]
    body = re.sub(r"%.*", "", text.replace(r"\%", ""))
    assert body.count("{") - body.count(r"\{") == body.count("}") - body.count(r"\}") and body.count("$") % 2 == 0


def test_an_axis_over_powers_of_ten_is_logarithmic_and_words_have_places(tmp_path):
    sweep = _sweep(tmp_path, {"optimizer.learning_rate": "1e-4,1e-2", "optimizer.schedule": "constant,cosine"})
    runs = _begin(sweep)
    for run in runs:
        _finish(run, 2.0)
    rate, schedule = (part.axes[0] for part in axes_figure(sweep, rows(runs, sweep.metric)).subfigs)
    assert rate.get_xscale() == "log" and [tick.get_text() for tick in schedule.get_xticklabels()] == [
        "constant", "cosine"
    ]  # fmt: skip


def test_bars_in_a_value_do_not_break_a_markdown_table():
    assert markdown_table([["a|b"], ["c"]]) == "| a\\|b |\n| --- |\n| c |\n"


def test_a_wrong_value_is_one_paragraph_and_nothing_is_written(tmp_path):
    for settings in ({"model.moe.experts_per_token": "2,400"}, {"optimizer.learning_rate": "1e-4,fast"}):
        with pytest.raises(ConfigError, match="1 of 2 combinations cannot be run"):
            check(_sweep(tmp_path / "sweep", settings))
    with pytest.raises(ConfigError, match="the same run as learning_rate=0.0003,seed=0"):
        check(_sweep(tmp_path / "sweep", {"optimizer.learning_rate": "3e-4,0.0003"}))
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        ({"seeds": 0}, "--seeds=0"),
        ({"method": "random"}, "must be told how many"),
        ({"trials": 3}, "runs every combination"),
        ({"metric": "loss"}, "must be one of held_out_bits_per_byte"),
    ],
)
def test_wrong_numbers_of_a_sweep_are_refused(tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        _sweep(tmp_path, **more)


def test_a_sweep_may_grow_by_seeds_and_values_and_keeps_the_names_of_its_runs(tmp_path):
    small = _begin(_sweep(tmp_path, {"optimizer.learning_rate": "1e-4,1e-3"}, seeds=1))
    large = _begin(_sweep(tmp_path, {"optimizer.learning_rate": "1e-4,5e-4,1e-3"}, seeds=3))
    assert {run.workdir for run in small} < {run.workdir for run in large} and len(large) == 9
    sweep, runs = read_sweep(tmp_path)
    assert [run.name for run in runs] == [run.name for run in large]
    assert [run.config for run in runs] == [run.config for run in large] and sweep.seeds == 3


def test_another_sweep_in_the_directory_is_refused_with_the_difference(tmp_path):
    _begin(_sweep(tmp_path, {"optimizer.learning_rate": "1e-4,1e-3"}))
    spec = (tmp_path / "sweep.json").read_text()
    other = dataclasses.replace(run_config(), optimizer=dataclasses.replace(run_config().optimizer, beta1=0.8))
    for changed, message in (
        (_sweep(tmp_path, {"optimizer.learning_rate": "1e-4"}), "sweep.optimizer.learning_rate 1e-4,1e-3 -> 1e-4"),
        (_sweep(tmp_path, {"optimizer.learning_rate": "1e-4,1e-3"}, seeds=1), "seeds 2 -> 1"),
        (_sweep(tmp_path, {"optimizer.beta2": "0.9"}), "sweep.optimizer.beta2 none -> 0.9"),
        (_sweep(tmp_path, {"optimizer.learning_rate": "1e-4,1e-3"}, other), r"optimizer.beta1  0.9 -> 0.8"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(changed)
    assert (tmp_path / "sweep.json").read_text() == spec
    harmless = dataclasses.replace(run_config(), name="other name")
    _begin(_sweep(tmp_path, {"optimizer.learning_rate": "1e-4,1e-3"}, harmless))
    assert load_recipe(str(tmp_path / "recipe.py")).name == "other name"


def test_the_python_of_the_docs_reads_a_sweep(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    for index, run in enumerate(_begin(_sweep("runs/sweeps/quickstart", {"optimizer.learning_rate": "1e-4,1e-3"}))):
        _finish(run, 3.0 - index)
    exec(program, {})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("learning_rate=0.001 0.5 0.7") and second.startswith("learning_rate=0.0001 2.5 0.7")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"runs": []}'])
def test_a_damaged_sweep_is_said_to_be_that(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ConfigError, match="no sweep can be read there"):
        read_sweep(tmp_path)
