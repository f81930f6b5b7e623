"""Slurm and Ray do what the local processes do, byte by byte; what is asked of them is what was said."""

import importlib.util
import os
import stat
import sys
from pathlib import Path

import pytest
from curation_corpus import changed, configure, prose, write_source

pytest.importorskip("datatrove")
pytest.importorskip("rensa")

from opendeep_jax.config.checks import ConfigError  # noqa: E402
from opendeep_jax.data.curation import (  # noqa: E402
    curate,
    curation_directory,
    executors,  # noqa: E402
)

RECIPE = {"quality": ("gopher_quality",), "exact_deduplication": True, "minhash_deduplication": True}

# sbatch that runs each element of the array at once, its directives and its dependency noted; nothing stays queued.
SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
directives = re.findall("^#SBATCH --(.*)$", script, flags=re.M)
number = len(open("{log}").readlines()) + 1 if os.path.exists("{log}") else 1
options = [argument for argument in sys.argv[1:-1] if "dependency" in argument]
open("{log}", "a").write(repr((directives, options)) + "\\n")
print("Submitted batch job", number)
if "merge_stats" in script or {idle}:
    sys.exit()
first, last = map(int, re.search("array=(\\\\d+)-(\\\\d+)", script).groups())
for index in range(first, last + 1):
    environment = os.environ | {{"SLURM_ARRAY_TASK_ID": str(index), "SLURM_NODELIST": "here", "RUN_OFFSET": "0"}}
    done = subprocess.run(["bash", sys.argv[-1]], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
"""
SRUN = '#!/bin/bash\nwhile [[ $1 == -* ]]; do if [[ $1 == -n ]]; then shift; fi; shift; done\nexec "$@"\n'


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A function that puts a Slurm on the PATH, and gives the file that notes what was submitted."""

    def install(idle: bool = False, queue: str = "") -> Path:
        log, programs = tmp_path / "submitted", tmp_path / "programs"
        programs.mkdir(exist_ok=True)
        launch = f'#!/bin/bash\nexec {sys.executable} -m datatrove.tools.launch_pickled_pipeline "$@"\n'
        for name, content in {
            "sbatch": SBATCH.format(python=sys.executable, log=log, idle=idle),
            "srun": SRUN,
            "scontrol": "#!/bin/bash\necho here\n",
            "squeue": f"#!/bin/bash\nprintf '{queue}'\n",
            "launch_pickled_pipeline": launch,
        }.items():
            (programs / name).write_text(content)
            (programs / name).chmod(stat.S_IRWXU)
        monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(executors, "POLL_SECONDS", 0.01)
        return log

    return install


@pytest.fixture
def sources(tmp_path) -> list[Path]:
    texts = [[prose(f"{i}/{j}") for j in range(4)] for i in range(2)]
    texts[1] += [texts[0][0], changed(texts[0][1])]
    return [write_source(tmp_path / f"s{i}.jsonl", own) for i, own in enumerate(texts)]


def result(config) -> dict[str, bytes]:
    directory = curation_directory(config)
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.glob("s*/*.parquet")}


@pytest.mark.slow
def test_slurm_runs_what_it_is_given_and_ends_with_the_same_bytes(slurm, sources, tmp_path):
    log = slurm()
    options = {"partition": "cpu", "time": "1:00:00", "cpus_per_task": "2"}
    config = configure(tmp_path / "slurm", *sources, **RECIPE)
    curated = curate(config, "slurm", progress=False, options=options)
    assert Path(curated[0].path).parent == curation_directory(config)
    local = configure(tmp_path / "local", *sources, **RECIPE)
    curate(local, progress=False)
    assert result(config) == result(local) != {}
    submitted = [eval(line) for line in log.read_text().splitlines()]
    stages = [entry for entry in submitted if "mem-per-cpu=1G" not in entry[0]]  # without datatrove's own statistics
    names, sizes = ["filter", "duplicates", "finish", "account"], [2, 1, 2, 1]
    for (directives, _), name, size in zip(stages, names, sizes, strict=True):
        wanted = {"partition=cpu", "time=1:00:00", "cpus-per-task=2", f"job-name=opendeep_curate_{name}"}
        assert wanted <= set(directives)
        assert any(directive.split("%")[0] == f"array=0-{size - 1}" for directive in directives)
    assert [len(dependency) for _, dependency in stages] == [0, 1, 1, 1]
    assert all("afterok:" in dependency[0] for _, dependency in stages[1:])


def test_a_slurm_job_that_fails_is_told_with_the_place_of_its_log(slurm, sources, tmp_path):
    slurm(idle=True)  # takes jobs, does nothing, and forgets them
    config = configure(tmp_path / "slurm", *sources, **RECIPE)
    with pytest.raises(ConfigError, match=r"Slurm could not finish the stage `filter`.*logs/filter"):
        curate(config, "slurm", progress=False, options={"partition": "cpu"})


def test_a_job_that_waits_for_a_failed_one_is_not_waited_for(slurm, sources, tmp_path):
    slurm(idle=True, queue="2 PENDING DependencyNeverSatisfied\\n")
    config = configure(tmp_path / "slurm", *sources, **RECIPE)
    with pytest.raises(ConfigError, match="could not finish the stage `filter`"):
        curate(config, "slurm", progress=False, options={"partition": "cpu"})


def test_jobs_that_are_still_queued_are_not_submitted_again(slurm, sources, tmp_path, monkeypatch):
    log = slurm(idle=True, queue="1 RUNNING None\\n")
    config = configure(tmp_path / "slurm", *sources, **RECIPE)

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(executors.time, "sleep", interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            curate(config, "slurm", progress=False, options={"partition": "cpu"})
    assert len(log.read_text().splitlines()) == 2 * 4  # each stage once, and datatrove's statistics of it


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.slow
def test_ray_ends_with_the_same_bytes(sources, tmp_path):
    config = configure(tmp_path / "ray", *sources, **RECIPE)
    curate(config, "ray", progress=False, options={"mem_per_cpu_gb": 1})
    local = configure(tmp_path / "local", *sources, **RECIPE)
    curate(local, progress=False)
    assert result(config) == result(local) != {}


@pytest.mark.parametrize(
    "executor, options, message",
    [
        ("cloud", {}, "must be local, slurm or ray"),
        ("local", {"partition": "cpu"}, "has no options"),
        ("slurm", {"partitions": "cpu"}, r"no option 'partitions'.*partition, "),
        ("slurm", {"partition": "cpu"}, "no `sbatch` here"),
    ],
)
def test_an_executor_that_cannot_work_is_refused_before_anything_is_done(
    sources, tmp_path, monkeypatch, executor, options, message
):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=message):
        curate(configure(tmp_path / "data", *sources, **RECIPE), executor, progress=False, options=options)
    assert not (tmp_path / "data").exists()


def test_slurm_without_a_partition_is_refused(slurm, sources, tmp_path):
    slurm()
    with pytest.raises(ConfigError, match="partition=NAME"):
        curate(configure(tmp_path / "data", *sources, **RECIPE), "slurm", progress=False)


def test_options_are_read_from_a_command_line():
    assert executors.parse_options("partition=cpu,time=8:00:00") == {"partition": "cpu", "time": "8:00:00"}
    assert executors.parse_options("") == {}
    with pytest.raises(ConfigError, match="name=value"):
        executors.parse_options("partition")
