"""What a run decides after bad steps, from what the device said of them; no step is trained here."""

import json

import numpy as np
import pytest

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.exits import Stopped
from opendeep_jax.config.operations import FaultsConfig
from opendeep_jax.faults import recovery
from opendeep_jax.faults.health import UpdateCheck
from opendeep_jax.faults.recovery import GoBack, Recovery
from opendeep_jax.record.events import read_events
from opendeep_jax.record.skipped_batches import PASSED_OVER, read_passed_over


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes the recovery of a new start of one run, whose batches have twelve pieces of ten documents; `.said` is
    what it printed."""
    pieces = [{"id": f"doc{i % 10}", "source": "corpus", "row": i} for i in range(12)]
    monkeypatch.setattr(recovery, "where", lambda prepared, step: [{**p, "id": f"{p['id']}/{step}"} for p in pieces])

    def make(writes=True, **faults) -> Recovery:
        said = []
        made = Recovery(tmp_path, FaultsConfig(**faults), None, said.append, writes)
        made.said = said
        return made

    return make


def note(run: Recovery, *steps: int, skipped=False, zscore=0.0, norm_zscore=0.0) -> None:
    loss = np.nan if skipped and not zscore else 4.0
    spike = max(zscore, norm_zscore) > run.faults.spike_zscore
    for step in steps:
        check = UpdateCheck(skipped, spike, np.float32(loss), np.float32(1.0), zscore, norm_zscore)
        run.note(step, UpdateCheck(*map(np.asarray, check)))


def went_back(run: Recovery) -> GoBack:
    with pytest.raises(GoBack) as raised:
        run.review()
    return raised.value


def test_good_steps_leave_no_trace(make, tmp_path):
    run = make()
    note(run, 1, 2, 3)
    assert run.review() == 0 and run.review() == 0
    assert run.said == [] and list(tmp_path.iterdir()) == []


def test_skipped_updates_in_a_row_are_counted_across_reviews(make):
    run = make(rollback_after=3)
    note(run, 5, 6, skipped=True)
    assert run.review() == 2
    note(run, 7, 8, skipped=True)
    fault = went_back(run)
    assert (fault.first, fault.last) == (5, 8)  # what was begun meanwhile is left out, too
    assert "3 updates in a row, from step 5 on" in str(fault)


def test_a_good_step_between_begins_the_count_anew(make):
    run = make(rollback_after=3)
    note(run, 5, 6, skipped=True)
    note(run, 7)
    note(run, 8, 9, skipped=True)
    assert run.review() == 4
    note(run, 10, skipped=True)
    assert went_back(run).first == 8


def test_no_number_of_skipped_updates_goes_back_when_told_never_to(make):
    run = make(rollback_after=0)
    note(run, *range(1, 50), skipped=True)
    assert run.review() == 49


def test_an_event_names_step_loss_and_documents_with_the_command_that_names_all(make, tmp_path):
    run = make()
    note(run, 12, skipped=True)
    run.review()
    (event,) = read_events(tmp_path)
    assert (event["kind"], event["step"], event["skipped"], event["loss"]) == ("non_finite", 12, True, "nan")
    assert [document["id"] for document in event["documents"]] == [f"doc{i}/11" for i in range(8)]
    assert event["documents_in_batch"] == 10
    assert f"opendeep data where --workdir={tmp_path} --step=11" in event["text"]
    assert "Its update was skipped." in event["text"] and "\n" not in event["text"]
    assert run.said == [f"non finite: {event['text']}"]


def test_documents_are_looked_up_for_the_first_few_steps_of_a_review_only(make, tmp_path):
    run = make(rollback_after=0)
    note(run, *range(1, 10), skipped=True)
    run.review()
    assert [("documents" in event) for event in read_events(tmp_path)] == [True] * 4 + [False] * 5


@pytest.mark.parametrize("policy, skipped", [("record", False), ("skip", True)])
def test_every_spike_of_a_review_is_recorded(policy, skipped, make, tmp_path):
    run = make(spike_policy=policy, spike_zscore=5.0)
    note(run, 20, 22, skipped=skipped, zscore=7.25)
    note(run, 21, zscore=4.9)
    assert run.review() == 2 * skipped
    events = read_events(tmp_path)
    assert [(event["kind"], event["step"], event["skipped"]) for event in events] == [
        ("spike", 20, skipped),
        ("spike", 22, skipped),
    ]
    assert "7.2 robust standard deviations above" in events[0]["text"]


def test_spikes_are_passed_by_without_a_word_when_told_to_ignore_them(make, tmp_path):
    run = make(spike_policy="ignore", spike_zscore=5.0)
    note(run, 20, zscore=100.0)
    assert run.review() == 0 and read_events(tmp_path) == []


def test_after_a_spike_the_run_goes_back_for_that_batch_alone(make):
    run = make(spike_policy="rollback", spike_zscore=5.0)
    note(run, 20)
    note(run, 21, 22, zscore=9.0)
    fault = went_back(run)
    assert (fault.first, fault.last) == (21, 21)
    run.go_back(fault, 22, 16)
    assert run.review() == 0  # what was undone is judged again when it is done again
    note(run, 22, zscore=9.0)
    assert went_back(run).first == 22


def test_a_window_is_on_disk_before_the_run_goes_on_and_the_next_start_reads_it(make, tmp_path):
    run = make()
    run.go_back(GoBack("bad", 5, 8), 9, 4)
    run.go_back(GoBack("worse", 12, 12), 12, 10)
    assert read_passed_over(tmp_path) == [
        {"first": 5, "last": 8, "to_step": 4, "reason": "bad", "last_update": 4, "taken_in": []},
        {"first": 12, "last": 12, "to_step": 10, "reason": "worse", "last_update": 10, "taken_in": []},
    ]
    again = make()
    passed = [step for step in range(1, 15) if again.passes_over(step)]
    assert passed == [step for step in range(1, 15) if run.passes_over(step)] == [5, 6, 7, 8, 12]
    assert run.went_back and not again.went_back
    event = read_events(tmp_path, "rollback")[0]
    assert (event["step"], event["to_step"], event["first"], event["last"]) == (9, 4, 5, 8)
    assert "Going back from step 9 to the state after step 4, and passing over" in event["text"]


def test_a_process_that_does_not_write_decides_the_same_in_silence(make, tmp_path):
    run = make(writes=False)
    note(run, 3, skipped=True)
    assert run.review() == 1
    run.go_back(GoBack("bad", 5, 8), 9, 4)
    assert run.passes_over(6) and run.said == [] and list(tmp_path.iterdir()) == []


def test_going_back_too_often_to_one_step_stops_with_a_diagnosis(make, tmp_path):
    for first in (5, 6):  # as two starts of the run: the count outlives them
        make(max_rollbacks=2).go_back(GoBack("bad", first, first), 9, 4)
    with pytest.raises(Stopped, match="the weights of step 4 2 times.*faults.max_rollbacks = 2.*learning rate"):
        make(max_rollbacks=2).go_back(GoBack("bad", 7, 7), 9, 4)
    (event,) = read_events(tmp_path, "stopped")
    assert event["step"] == 9 and "\n" not in event["text"]
    assert len(read_passed_over(tmp_path)) == 2


def test_going_back_to_later_steps_may_happen_any_number_of_times(make):
    run = make(max_rollbacks=1)
    for step in range(10, 100, 10):
        run.go_back(GoBack("bad", step + 1, step + 1), step + 2, step)
    with pytest.raises(Stopped):
        run.go_back(GoBack("bad", 93, 93), 94, 90)


def test_corrupt_memory_passes_over_nothing_and_is_counted_too(make, tmp_path):
    run = make(max_rollbacks=2)
    run.go_back(GoBack("copies differ"), 9, 4)
    run.go_back(GoBack("copies differ"), 19, 14)
    run.go_back(GoBack("copies differ"), 9, 4)
    assert not (tmp_path / PASSED_OVER).exists() and not any(map(run.passes_over, range(30)))
    with pytest.raises(Stopped, match="copies differ"):
        run.go_back(GoBack("copies differ"), 9, 4)


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"first": 1}]', '[{"first": "x", "last": 2, "to_step": 0}]', "7"])
def test_a_damaged_list_of_windows_is_refused_and_never_taken_for_none(text, make, tmp_path):
    (tmp_path / PASSED_OVER).write_text(text)
    with pytest.raises(ConfigError, match="passed_over.json is damaged .*rollback events in events.jsonl"):
        make()


def test_windows_that_someone_wrote_by_hand_are_taken(make, tmp_path):
    (tmp_path / PASSED_OVER).write_text(json.dumps([{"first": 3, "last": 4, "to_step": 2}]))
    assert [step for step in range(1, 9) if make().passes_over(step)] == [3, 4]


def test_a_start_in_the_middle_of_skipped_updates_counts_on(make):
    run = make(rollback_after=4)
    run.begin(step=8, last_update=5)
    note(run, 9, skipped=True)
    fault = went_back(run)
    assert (fault.first, fault.last) == (6, 9) and "4 updates in a row, from step 6 on" in str(fault)


def test_steps_that_are_passed_over_count_neither_as_skipped_nor_as_an_update(make):
    run = make(rollback_after=4)
    run.go_back(GoBack("bad", 6, 8), 9, 8, last_update=5)
    note(run, 9, 10, 11, skipped=True)
    assert run.review() == 3
    again = make(rollback_after=4)
    again.begin(step=11, last_update=5)
    for one in (run, again):
        note(one, 12, skipped=True)
        assert went_back(one).first == 9


def test_going_back_to_later_checkpoints_of_the_same_weights_is_no_progress(make):
    run = make(max_rollbacks=2)
    for step in (28, 36):
        run.go_back(GoBack("bad", step - 6, step + 1), step + 1, step, last_update=21)
    with pytest.raises(Stopped, match="gone back to the weights of step 21 2 times"):
        run.go_back(GoBack("bad", 38, 45), 45, 44, last_update=21)


def test_what_was_skipped_is_taken_in_when_it_is_passed_over_also_by_a_later_start(make):
    run = make(rollback_after=3, spike_zscore=5.0)
    note(run, 7)
    note(run, 8, skipped=True, zscore=9.0)
    note(run, 9, 10, skipped=True)
    run.go_back(went_back(run), 10, 8, last_update=7)
    for one in (run, make()):
        assert one.taken_in(8) == (4.0, 1.0)
        assert np.isnan([*one.taken_in(9), *one.taken_in(7)]).all()


def test_a_spike_of_the_gradient_is_named_as_one(make, tmp_path):
    run = make(spike_policy="rollback", spike_zscore=5.0)
    note(run, 20, zscore=0.5, norm_zscore=8.25)
    fault = went_back(run)
    assert "gradient norm 1" in str(fault)
    (event,) = read_events(tmp_path)
    assert "its norm 8.2 robust standard deviations above" in event["text"]
    assert (event["kind"], event["loss_zscore"], event["grad_norm_zscore"]) == ("spike", "0.5", "8.25")


@pytest.mark.parametrize("policy, first", [("rollback", 7), ("skip", 7), ("record", None)])
def test_the_advice_names_what_can_be_done_in_that_directory(policy, first, make, tmp_path):
    """Only faults.* may change where a run goes on; a lower learning rate takes another directory."""
    run = make(max_rollbacks=1, spike_policy=policy)
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    run.go_back(GoBack("bad", first, first), 9, 4)
    with pytest.raises(Stopped) as stopped:
        run.go_back(GoBack("bad", first, first), 9, 4)
    text = str(stopped.value)
    assert "--faults.max_rollbacks=3" in text
    assert ("--faults.spike_policy=record" in text) == (policy == "rollback")
    branch = f"opendeep train --from={tmp_path}@4 --workdir=NEW --optimizer.learning_rate="
    assert (branch in text) == (first is not None)
    (tmp_path / "checkpoints" / "4").rmdir()  # a run that began from its seed
    with pytest.raises(Stopped) as stopped:
        run.go_back(GoBack("bad", first, first), 9, 4)
    assert "--from" not in str(stopped.value)
    make(max_rollbacks=3).go_back(GoBack("bad", first, first), 9, 4)
