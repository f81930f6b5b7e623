"""Each launch file is walked through with stand-ins for the programs that it calls, every call failing once:
machines are given back, final statuses stay final, and crash loops end."""

import functools
import itertools
import shlex
from pathlib import Path

import pytest
from rendered_jobs import bash, container, programs, read_yaml, rendered, startup_script

from opendeep_jax.cli.launch import main

MOST_STARTS = 8
"""More than any of these jobs may need, far fewer than --restarts."""


text_of = functools.cache(rendered)


def failing(k: int, body: str, error: str = "exit 1", late: bool = False) -> str:
    """A stand-in's script in which the k-th call of all stand-ins fails: before it has done anything, or `late`, when
    it has and only the answer is lost."""
    count = 'echo >>"$COUNT"; n=$(wc -l <"$COUNT")\n'
    if late:
        return f"{count}({body})\ns=$?\nif ((n == {k})); then {error}; fi\nexit $s"
    return f"{count}if ((n == {k})); then {error}; fi\n{body}"


def numbered(statuses: list[tuple[int, ...]], process: str) -> str:
    """A stand-in for the run: the status of a process at its n-th start; the last ones for ever."""
    rows = " ".join(f'"{" ".join(map(str, row))}"' for row in statuses)
    return f"""p={process}; echo >>starts.$p; n=$(wc -l <starts.$p); all=({rows})
((n <= {len(statuses)})) || n={len(statuses)}
row=(${{all[n - 1]}}); exit "${{row[p]}}\""""


def starts(directory: Path, process: int = 0) -> int:
    path = directory / f"starts.{process}"
    return len(path.read_text().splitlines()) if path.exists() else 0


FINAL = [(final, other) for final in (2, 3, 130) for other in (134, 137, 75, 1, 0)]
BOTH_WAYS = [pair for one in FINAL for pair in (one, one[::-1])]

# ---- Slurm

SRUN = """
while [[ $1 != sh ]]; do shift; done
SLURM_PROCID=0 "$@" & first=$!
SLURM_PROCID=1 "$@" & second=$!
wait $first; a=$?; wait $second; b=$?
exit $((a > b ? a : b))  # the highest, as srun's"""


def slurm(directory: Path, statuses: list[tuple[int, ...]], k: int = 0, first: str = "") -> tuple[int, int]:
    """The last status of the batch script, and how often it ran until it was not queued again."""
    directory.mkdir()
    shared = directory / "shared"
    (shared / "run").mkdir(parents=True)
    text = text_of("slurm", "--workdir=/shared/run").replace("/shared", str(shared))
    own = {"srun": SRUN, "scontrol": "echo >>requeued"}
    environment = programs(
        directory / "bin",
        **{name: failing(k, body) for name, body in own.items()},
        opendeep=first + numbered(statuses, "$SLURM_PROCID"),
    )
    environment |= {"SLURM_JOB_ID": "17", "POLL_SECONDS": "0", "COUNT": str(directory / "count")}
    for again in range(MOST_STARTS):
        before = (directory / "requeued").exists() and (directory / "requeued").read_text()
        done = bash(text, environment | {"SLURM_RESTART_COUNT": str(again)}, directory)
        after = (directory / "requeued").exists() and (directory / "requeued").read_text()
        if before == after:
            return done.returncode, again + 1
    pytest.fail("it is queued again for ever")


def test_slurm_sees_the_final_status_of_one_process_behind_whatever_the_other_ended_with(tmp_path):
    for pair in BOTH_WAYS:
        final = next(status for status in pair if status in (2, 3, 130))
        assert slurm(tmp_path / f"{pair[0]}-{pair[1]}", [pair]) == (final, 1), pair


@pytest.mark.parametrize(
    "statuses, last, runs",
    [
        ([(75, 75), (0, 0)], 0, 2),
        ([(137, 134), (0, 0)], 0, 2),
        ([(75, 134), (75, 134), (75, 134), (0, 0)], 0, 4),
        ([(1, 134)], 1, 2),
        ([(1, 75)], 1, 2),
        ([(134, 134)], 134, 2),
        ([(139, 134)], 139, 2),
        ([(127, 127)], 127, 2),
        ([(1, 75), (75, 75), (1, 75), (0, 0)], 0, 4),
    ],
)
def test_slurm_queues_a_crash_again_once_unless_the_run_got_further(statuses, last, runs, tmp_path):
    assert slurm(tmp_path / "a", statuses) == (last, runs)


def test_slurm_counts_a_new_checkpoint_as_progress(tmp_path):
    step = "$(cat starts.0 2>/dev/null | wc -l)00"
    saves = f"((SLURM_PROCID)) || mkdir -p {tmp_path}/a/shared/run/checkpoints/{step}\n"
    assert slurm(tmp_path / "a", [(1, 75)] * 4 + [(0, 0)], first=saves) == (0, 5)


def test_an_abort_of_a_run_that_never_began_is_final_for_slurm(tmp_path):
    """JAX aborts those whose process 0 has ended by itself; srun tells of nothing but the abort."""
    environment = programs(tmp_path, srun="exit 134", scontrol="") | {"SLURM_JOB_ID": "7"}
    assert bash(rendered("slurm", "--workdir=/shared/runs/never"), environment, tmp_path).returncode == 134
    assert not (tmp_path / "scontrol.log").exists()


@pytest.mark.parametrize("k", range(1, 6))
def test_whatever_call_of_the_slurm_file_fails_once_the_job_ends_as_it_should(k, tmp_path):
    assert slurm(tmp_path / "final", [(2, 134)], k)[0] == 2
    assert slurm(tmp_path / "trained", [(75, 75), (137, 134), (0, 0)], k)[0] == 0
    status, runs = slurm(tmp_path / "crashes", [(1, 134)], k)
    assert status == 1 and runs <= 3


def test_a_job_that_slurm_never_takes_back_says_what_to_do(tmp_path):
    environment = programs(tmp_path, srun="exit 75", scontrol="exit 1") | {"SLURM_JOB_ID": "7", "POLL_SECONDS": "0"}
    done = bash(rendered("slurm"), environment, tmp_path)
    assert done.returncode == 75 and "give the same sbatch command again" in done.stderr
    assert len((tmp_path / "scontrol.log").read_text().splitlines()) == 5


# ---- Cloud TPU VMs

GCLOUD = """
state=$(cat state 2>/dev/null)
case "$*" in
  *describe*) [[ -n $state ]] || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
    echo "$state"; [[ $state != WAITING_FOR_RESOURCES ]] || tail -n "+$(wc -l <created)" next | head -n 1 >state ;;
  *ssh*) [[ $state == ACTIVE ]] || exit 1
    echo >>polls; (($(wc -l <polls) >= 3)) && cat ended ;;
  *create*) [[ -z $state ]] || { echo "ERROR: ALREADY_EXISTS" >&2; exit 1; }
    echo >>created; echo WAITING_FOR_RESOURCES >state ;;
  *delete*) [[ -n $state ]] || { echo "ERROR: NOT_FOUND" >&2; exit 1; }
    rm state ;;
esac"""


def tpu_vm(directory: Path, next_states: list[str], ended: str, k: int = 0, late: bool = False, *more: str):
    """The loop's end, its status in front: (status, requests that were made, what is left, what was said)."""
    directory.mkdir()
    (directory / "next").write_text("\n".join(next_states + next_states[-1:] * MOST_STARTS) + "\n")
    (directory / "ended").write_text(ended)
    error = 'echo "ERROR: (gcloud) UNAVAILABLE: The service is currently unavailable." >&2; exit 1'
    environment = programs(directory / "bin", gcloud=failing(k, GCLOUD, error, late))
    environment |= {"POLL_SECONDS": "0", "COUNT": str(directory / "count")}
    done = bash(text_of("tpu-vm", *more), environment, directory)
    made = directory / "created"
    requests = len(made.read_text().splitlines()) if made.exists() else 0
    return done.returncode, requests, (directory / "state").exists(), done.stderr


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("k", range(1, 12))
def test_whatever_call_of_the_tpu_loop_fails_once_machines_are_given_back_and_the_status_is_the_runs(k, late, tmp_path):
    status, _, left, said = tpu_vm(tmp_path / "a", ["ACTIVE"], "3\n", k, late)
    assert (status, left) == (3, False), said
    assert "Machines may be there" not in said


@pytest.mark.parametrize("k", [0, 5, 6, 7, 8])
def test_machines_that_were_taken_away_are_asked_for_again_whatever_call_fails(k, tmp_path):
    status, requests, left, said = tpu_vm(tmp_path / "a", ["SUSPENDED", "ACTIVE"], "0\n", k)
    assert (status, requests, left) == (0, 2, False), said


def test_machines_that_are_never_made_end_the_loop_and_leave_nothing(tmp_path):
    status, requests, left, _ = tpu_vm(tmp_path / "a", ["FAILED"], "0\n")
    assert (status, requests, left) == (2, 3, False)


def test_machines_that_are_taken_away_for_ever_end_the_loop(tmp_path):
    status, requests, left, _ = tpu_vm(tmp_path / "a", ["SUSPENDED"], "0\n", 0, False, "--restarts=3")
    assert (status, requests, left) == (75, 4, False)


@pytest.mark.parametrize(
    "ended, status",
    [("137\n2\n", 2), ("134\n134\n3\n", 3), ("0\n0\n", 0), ("75\n", 75), ("0\n2\n", 2), ("noise\n1\n", 1)],
)
def test_the_telling_status_of_all_machines_counts(ended, status, tmp_path):
    assert tpu_vm(tmp_path / "a", ["ACTIVE"], ended)[::2] == (status, False)


def test_a_delete_that_never_succeeds_is_named_with_the_command_for_it(tmp_path):
    gcloud = 'case "$*" in *describe*) echo ACTIVE ;; *ssh*) echo 3 ;; *) exit 1 ;; esac'
    done = bash(rendered("tpu-vm"), programs(tmp_path, gcloud=gcloud) | {"POLL_SECONDS": "0"}, tmp_path)
    assert done.returncode == 3
    assert "gcloud compute tpus queued-resources delete opendeep-a --project=p1 --zone=us-east5-b" in done.stderr


@pytest.mark.parametrize("word", ["TERM", "INT", "HUP"])
def test_a_loop_that_is_stopped_names_what_is_left(word, tmp_path):
    gcloud = f'case "$*" in *describe*) echo ACTIVE ;; *ssh*) kill -{word} $(cat pid) ;; esac'
    environment = programs(tmp_path, gcloud=gcloud) | {"POLL_SECONDS": "1"}
    done = bash("echo $$ >pid\n" + rendered("tpu-vm"), environment, tmp_path)
    assert done.returncode in (130, 143) and "queued-resources delete opendeep-a" in done.stderr


@pytest.mark.parametrize("ended, status, left", [("", 2, True), ("0", 0, False)])
def test_machines_of_another_request_are_not_taken_for_this_files(ended, status, left, tmp_path):
    """As after `launch` with another topology: what still runs there is left alone, what has ended is given back."""
    (tmp_path / "state").write_text("ACTIVE abcdef")
    gcloud = """
case "$*" in
  *describe*) [[ -e state ]] && cat state || { echo NOT_FOUND >&2; exit 1; } ;;
  *ssh*) echo "$ENDED" ;;
  *create*) echo >>created; echo ACTIVE >state ;;
  *delete*) rm state ;;
esac"""
    environment = programs(tmp_path / "bin", gcloud=gcloud) | {"POLL_SECONDS": "0", "ENDED": ended}
    done = bash(rendered("tpu-vm"), environment, tmp_path)
    assert (done.returncode, (tmp_path / "state").exists()) == (status, left), done.stderr
    assert (tmp_path / "created").exists() == (status == 0)


def machine(directory: Path, statuses: list[int], k: int = 0) -> tuple[str, int]:
    """What a machine's own script writes as its status, and how often the run began."""
    directory.mkdir()
    own = {"mkdir": "exit 0", "mountpoint": "exit 1", "mount": "exit 0", "sleep": "exit 0"}
    docker = numbered([(status,) for status in statuses], "0")
    bodies = {name: failing(k, body) for name, body in own.items()} | {"docker": failing(k, docker, "exit 125")}
    environment = programs(directory / "bin", **bodies) | {"COUNT": str(directory / "count")}
    bash(startup_script(text_of("tpu-vm"), directory), environment, directory)
    return (directory / "status").read_text().strip(), starts(directory)


@pytest.mark.parametrize("k", range(1, 9))
def test_whatever_call_of_a_tpu_machine_fails_once_the_run_goes_on_to_its_end(k, tmp_path):
    assert machine(tmp_path / "a", [75, 137, 134, 3], k)[0] == "3"


@pytest.mark.parametrize(
    "statuses, last, runs",
    [([1], "1", 2), ([127], "127", 2), ([125], "125", 5), ([1, 75, 1, 0], "0", 4), ([130], "130", 1)],
)
def test_crashes_of_a_tpu_machine_end(statuses, last, runs, tmp_path):
    assert machine(tmp_path / "a", statuses) == (last, runs)


# ---- SkyPilot and Kubernetes: their rules, as the files set them


def sky(directory: Path, statuses: list[tuple[int, ...]]) -> tuple[int, int]:
    """The job's last status and its starts, by SkyPilot's rule: a listed exit code, of any node, recovers it."""
    directory.mkdir()
    (directory / "run").mkdir()
    task = read_yaml(text_of("skypilot", "--workdir=/shared/run").replace("/shared", str(directory)))
    rules = task["resources"]["job_recovery"]
    assert rules["max_restarts_on_errors"] == 0
    environment = programs(directory / "bin", opendeep=numbered(statuses, "$SKYPILOT_NODE_RANK"))
    for count in range(1, MOST_STARTS):
        codes = [
            bash(
                task["run"], environment | {"SKYPILOT_NODE_RANK": rank, "SKYPILOT_TASK_ID": "sky-1"}, directory
            ).returncode
            for rank in "01"
        ]
        if not set(codes) & set(rules["recover_on_exit_codes"]):
            return max(codes), count
    pytest.fail("it is recovered for ever")


@pytest.mark.parametrize(
    "statuses, last, runs",
    [([(status, status)], status, 1) for status in (0, 2, 3, 127)]
    + [([(75, 75), (137, 134), (0, 0)], 0, 3), ([(1, 1)], 1, 2), ([(1, 0), (75, 75), (0, 0)], 0, 3)],
)
def test_skypilot_starts_again_what_that_can_cure(statuses, last, runs, tmp_path):
    assert sky(tmp_path / "a", statuses) == (last, runs)


@pytest.mark.parametrize("target", ["gke-tpu", "gke-gpu"])
def test_kubernetes_fails_the_set_for_a_final_status_of_any_pod_and_cleans_up(target):
    spec = read_yaml(rendered(target))["spec"]
    assert spec["ttlSecondsAfterFinished"] > 0
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (job,) = spec["replicatedJobs"]
    (fails,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
    codes = fails["onExitCodes"]
    assert fails["action"] == "FailJob" and (codes["operator"], codes["values"]) == ("In", [2, 3])
    assert job["template"]["spec"]["backoffLimit"] == 0  # others start all again together
    # A second crash without progress ends with 3, by the run's own count (cli/starts.py).
    assert {"name": "OPENDEEP_JOB", "value": "opendeep-a"} in container({"spec": spec})["env"]


# ---- several processes here


@pytest.mark.parametrize("pair", [*BOTH_WAYS, (137, 75), (134, 75), (1, 75), (1, 137), (0, 0)])
def test_the_local_script_ends_with_the_telling_status(pair, tmp_path, capsys):
    argv = ["--config=quickstart", f"--workdir={tmp_path}/run", "--processes=2", "--restarts=1", "--dry_run"]
    assert main(argv) == 0
    body = numbered([pair, (0, 0)], "$OPENDEEP_PROCESS_ID")
    done = bash(capsys.readouterr().out, programs(tmp_path / "bin", opendeep=body), tmp_path)
    final = [status for status in pair if status in (2, 3, 130)]
    again = not final and (137 in pair or 134 in pair)
    assert done.returncode == (final[0] if final else 0 if again else max(status for status in pair if status != 75))
    assert starts(tmp_path) == (2 if again else 1)


def test_every_stand_in_counts_and_the_kth_call_is_the_one_that_fails(tmp_path):
    environment = programs(tmp_path / "bin", one=failing(2, "exit 0")) | {"COUNT": str(tmp_path / "count")}
    done = bash("; ".join(itertools.repeat("one; echo $?", 3)), environment, tmp_path)
    assert shlex.split(done.stdout) == ["0", "1", "0"]
