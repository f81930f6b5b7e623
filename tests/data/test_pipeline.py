import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_corpus import write_corpus

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import DataPhase, ModelConfig, RampStage, SourceConfig
from opendeep_jax.data.describe import table
from opendeep_jax.data.held_out import compressors
from opendeep_jax.data.opening import open_data
from opendeep_jax.data.provenance import verify_all, when, where
from opendeep_jax.data.recorded import reopen
from opendeep_jax.data.tokenizers import prepare_tokenizer


def assert_same(one, two):
    for field in dataclasses.fields(one)[:5]:
        np.testing.assert_array_equal(getattr(one, field.name), getattr(two, field.name), field.name)


def two_sources(tmp_path, corpus):
    other = write_corpus(tmp_path / "other", 25, salt=5)
    repeated = {"epochs": 1000.0}
    return SourceConfig("corpus", str(corpus), 3.0, **repeated), SourceConfig("other", str(other), 1.0, **repeated)


def test_batches_are_integers_of_the_configured_shape(configure):
    batch = open_data(configure(), progress=False).batch(0)
    for field in dataclasses.fields(batch)[:5]:
        array = getattr(batch, field.name)
        assert array.shape == (4, 32) and array.dtype == (np.bool_ if field.name == "loss_mask" else np.int32)


def test_a_target_is_the_next_token_of_its_own_document(configure):
    data = open_data(configure(), progress=False)
    batches = [data.batch(step) for step in range(16)]
    tokens, targets, mask, segments, positions = (
        np.concatenate([getattr(batch, name) for batch in batches])
        for name in ("tokens", "targets", "loss_mask", "segment_ids", "positions")
    )
    here, after = segments[:, :-1], segments[:, 1:]
    inside, between = (here == after) & (here > 0), (here != after) & (after > 0)
    assert inside.any() and between.any()
    assert (targets[:, :-1] == tokens[:, 1:])[inside].all()
    assert mask[:, :-1][inside].all() and not mask[:, :-1][between].any()
    assert (positions[:, 1:] == np.where(inside, positions[:, :-1] + 1, 0)).all()


def test_batch_is_the_same_in_any_order_after_opening_again_and_from_any_start(configure, tmp_path, corpus):
    config = configure(sources=two_sources(tmp_path, corpus), tokenizer="bpe:300")
    data = open_data(config, progress=False)
    batches = [data.batch(step) for step in range(40)]
    again = open_data(config, progress=False)
    for step in reversed(range(40)):
        assert_same(again.batch(step), batches[step])
    for step, batch in zip(range(17, 30), again.iterate(17), strict=False):
        assert_same(batch, batches[step])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_parts_of_all_processes_make_the_global_batch(configure, processes):
    data = open_data(configure(), progress=False)
    for step in (0, 31):
        parts = [data.batch(step, range(i, i + 4 // processes)) for i in range(0, 4, 4 // processes)]
        whole = data.batch(step)
        for field in dataclasses.fields(whole)[:5]:
            joined = np.concatenate([getattr(part, field.name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, field.name))
    streams = [data.iterate(5, lambda rows, i=i: range(rows)[i::processes]) for i in range(processes)]
    parts, whole = [next(stream).tokens for stream in streams], data.batch(5).tokens
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(part, whole[i::processes])


def test_rows_beyond_a_batch_are_padding_without_a_target(configure):
    data = open_data(configure(), progress=False)
    part, whole = data.batch(2, [1, 3, 4, 9]), data.batch(2)
    np.testing.assert_array_equal(part.tokens[:2], whole.tokens[[1, 3]])
    assert not part.tokens[2:].any() and not part.loss_mask[2:].any() and not part.segment_ids[2:].any()


def test_batch_size_ramp_takes_the_same_rows_in_smaller_batches(configure):
    ramped = open_data(configure(ramp=(RampStage(2, tokens=3 * 2 * 32),)), progress=False)
    plain = open_data(configure(batch_size=2), progress=False)
    assert [len(ramped.batch(step).tokens) for step in range(5)] == [2, 2, 2, 4, 4]
    rows = np.concatenate([ramped.batch(step).tokens for step in range(5)])
    np.testing.assert_array_equal(rows, np.concatenate([plain.batch(step).tokens for step in range(7)]))


def ids_of(store, documents):
    return {store.describe(int(document))["id"] for document in documents}


def test_an_epoch_trains_on_every_training_document_and_no_held_out_one(configure):
    prepared = open_data(configure(), progress=False)
    (plan,), (held_out,), (store,) = prepared.plans.values(), prepared.held_out_plans, prepared.stores
    steps = -(-plan.rows // 4)
    trained = {piece["id"] for step in range(steps) for piece in where(prepared, step)}
    kept = ids_of(store, held_out.documents)
    assert trained.isdisjoint(kept) and trained | kept == ids_of(store, range(store.documents)) and kept


def test_where_names_the_documents_of_a_batch_and_shows_their_text(configure, corpus):
    data = open_data(configure(), progress=False)
    batch = data.batch(3)
    for row, pieces in itertools.groupby(where(data, 3, None, text=True), lambda piece: piece["row"]):
        text = b""
        for piece in pieces:
            whole = (corpus / piece["id"]).read_bytes()
            ((begin, end),) = piece["bytes"]
            assert piece["text"] == whole[begin:end].decode("utf-8", "replace") and piece["license"] == "CC0-1.0"
            text += whole[begin:end]
        used = batch.segment_ids[row] > 0
        tokens = [*batch.tokens[row][used], batch.targets[row][used][-1]]
        assert bytes(int(token) for token in tokens if token < 256) == text


def test_a_document_is_found_by_where_at_the_steps_that_when_names(configure, corpus):
    (corpus / "part0" / "planted.py").write_text("a planted document " * 9)
    prepared = open_data(configure(steps=100), progress=False)
    (found,) = when(prepared, "part0/planted.py")
    assert found["seen"] and not found["held_out"]
    for step in range(100):
        rows = [piece["row"] for piece in where(prepared, step) if piece["id"] == "part0/planted.py"]
        assert rows == [place["row"] for place in found["seen"] if place["step"] == step]
    with pytest.raises(ConfigError, match="--doc=nothing: no document of corpus has this id"):
        when(prepared, "nothing")


def test_fill_in_the_middle_rearranges_documents_and_loses_nothing(configure, tmp_path):
    plain, rearranged = (open_data(configure(fim_rate=rate, held_out_fraction=0.0), progress=False) for rate in (0, 1))
    (store,) = rearranged.stores
    (plan,) = rearranged.plans.values()
    prefix, hole, stop = rearranged.tokenizer.fim_ids
    steps = range(-(-plan.rows // 4))
    ids = np.concatenate([[0], *(batch.targets[batch.loss_mask] for batch in map(rearranged.batch, steps))])
    every = np.concatenate([batch.targets[batch.loss_mask] for batch in map(plain.batch, steps)])
    assert [np.sum(ids == mark) for mark in (prefix, hole, stop)] >= [store.documents] * 3
    assert rearranged.content_hash != plain.content_hash and len(every) < len(ids)


def test_fill_in_the_middle_needs_special_tokens(configure, tmp_path):
    trained = prepare_tokenizer(configure(tokenizer="bpe:300"), progress=False)
    text = Path(trained.path).read_text("utf-8").replace("fim▁hole", "another")
    (tmp_path / "tokenizer.json").write_text(text, "utf-8")
    with pytest.raises(ConfigError, match="fim_rate = 0.1, but the tokenizer .* has no special tokens"):
        open_data(configure(tokenizer=str(tmp_path / "tokenizer.json"), fim_rate=0.1), progress=False)


def test_phases_of_several_lengths_have_their_own_batches_and_share_no_document(configure):
    phases = (
        DataPhase("main", tokens=4 * 32 * 5, packing="best_fit"),
        DataPhase("long", sequence_length=64, batch_size=2),
    )
    data = open_data(configure(phases=phases, steps=30), progress=False)
    assert [data.batch(step).tokens.shape for step in (0, 4, 5, 29)] == [(4, 32), (4, 32), (2, 64), (2, 64)]
    documents = [set(plan.documents.tolist()) for plan in data.plans.values()]
    assert not documents[0] & documents[1]
    assert [phase["name"] for phase in data.describe()["phases"]] == ["main", "long"]


def test_a_run_that_would_exhaust_its_text_is_refused(configure, corpus):
    once = SourceConfig("corpus", str(corpus))
    with pytest.raises(ConfigError, match="'corpus' is exhausted before the run ends.*data.sources.0.epochs="):
        open_data(configure(sources=(once,)), progress=False)


def test_held_out_batches_cover_the_held_out_text_once(configure, tmp_path, corpus):
    data = open_data(configure(sources=two_sources(tmp_path, corpus), tokenizer="bpe:300"), progress=False)
    batches = data.held_out(3)
    assert data.held_out_text() and len(batches[0].tokens) == 3 == len(batches[-1].tokens)
    targets = np.concatenate([batch.targets[batch.loss_mask] for batch in batches])
    assert data.tokenizer.token_bytes[targets].sum() == len(data.held_out_text())
    assert data.tokenizer.decode(targets).encode() == data.held_out_text()
    assert not batches[-1].loss_mask[batches[-1].segment_ids == 0].any()
    parts = [data.held_out(4, rows=rows)[1].tokens for rows in ([0, 1], [2, 3, 4])]
    np.testing.assert_array_equal(np.concatenate(parts)[:4], data.held_out(4)[1].tokens)
    assert not parts[1][2].any()
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_few_held_out_batches_are_spread_over_the_text(configure):
    data = open_data(configure(sequence_length=8), progress=False)
    everything, few = np.concatenate([batch.tokens for batch in data.held_out(1)]), data.held_out(2, max_batches=3)
    assert len(few) == 3
    rows = np.concatenate([batch.tokens for batch in few])
    np.testing.assert_array_equal(rows, everything[np.arange(6) * len(everything) // 6])
    assert len(data.held_out(2, max_batches=10**6)) == -(-len(everything) // 2)


def test_nothing_held_out_gives_no_batches(configure):
    data = open_data(configure(held_out_fraction=0.0), progress=False)
    assert len(data.held_out(4)) == 0 and data.held_out_text() == b"" and data.compression() == {}


def test_sources_are_mixed_by_weight(configure, tmp_path, corpus):
    prepared = open_data(configure(sources=two_sources(tmp_path, corpus)), progress=False)
    rows = {(step, piece["row"]): piece["source"] for step in range(25) for piece in where(prepared, step)}
    assert sum(source == "corpus" for source in rows.values()) == 75


def test_description_counts_what_is_there(configure, corpus):
    (corpus / "latin.txt").write_bytes("é".encode("latin-1"))
    described = open_data(configure(), progress=False).describe()
    assert described["train_documents"] + described["held_out_documents"] == 30
    assert described["train_tokens"] == described["train_bytes"] + 2 * described["train_documents"]
    assert described["left_out"] == {"corpus: not UTF-8": 1}
    assert described["sources"][0]["license"] == "CC0-1.0" and described["sources"][0]["share"] == 1
    (plan,) = described["plans"]
    assert 0 <= plan["padding"] < 0.05 and plan["truncated"] == 0  # none fits a row of 32
    json.dumps(described)
    assert "corpus" in table(described) and "CC0-1.0" in table(described)


def test_prepared_data_is_opened_and_not_made_again(configure, monkeypatch):
    config = configure(tokenizer="bpe:300")
    first = open_data(config, progress=False)
    for name in ("tokenizers.train_bpe", "opening.prepare_store", "opening.list_parts", "plan.pack"):
        monkeypatch.setattr(f"opendeep_jax.data.{name}", lambda *args, **kwargs: pytest.fail("made again"))
    assert open_data(config, progress=False).content_hash == first.content_hash


def test_a_run_is_opened_again_from_its_record_without_its_sources(configure, corpus):
    data = open_data(configure(fim_rate=0.5), progress=False)
    record = json.loads(json.dumps(data.describe()["record"]))
    shutil.rmtree(corpus)
    again = reopen(data.config, record, data.tokenizer)
    assert again.content_hash == data.content_hash
    assert_same(again.batch(7), data.batch(7))


def test_a_prepared_store_is_a_source_like_any_other(configure, tmp_path):
    first = open_data(configure(), progress=False)
    (store,) = first.stores
    moved = shutil.copytree(store.directory, tmp_path / "elsewhere")
    source = SourceConfig("corpus", str(moved), license="CC0-1.0", epochs=1000.0)
    second = open_data(configure(sources=(source,), directory=str(tmp_path / "new")), progress=False)
    assert second.content_hash == first.content_hash
    with pytest.raises(ConfigError, match="is tokenized already"):
        open_data(configure(sources=(source,), tokenizer="bpe:300"), progress=False)


def test_changed_text_is_tokenized_again(configure, corpus):
    first = open_data(configure(), progress=False)
    (corpus / "new.py").write_text("something new")
    assert open_data(configure(), progress=False).content_hash != first.content_hash


def test_damaged_plan_is_named_with_its_cure_and_made_again_the_same(configure):
    first = open_data(configure(), progress=False)
    (plan,) = first.plans.values()
    batch = first.batch(0)
    path = plan.directory / "begins.bin"
    path.with_name("copy").write_bytes(path.read_bytes()[:100])  # The open plan keeps the old file.
    path.with_name("copy").replace(path)
    with pytest.raises(ConfigError, match="begins.bin is damaged: 100 bytes instead of .*Delete .*prepare. again"):
        open_data(configure(), progress=False)
    shutil.rmtree(plan.directory)
    again = open_data(configure(), progress=False)
    assert again.content_hash == first.content_hash
    assert_same(again.batch(0), batch)


def test_a_flipped_byte_is_found_by_verify_and_named(configure, tmp_path):
    data = open_data(configure(), progress=False)
    root = tmp_path / "prepared"
    number, damage = verify_all(root)
    assert (number, damage) == (3, [])
    (plan,) = data.plans.values()
    victims = [plan.directory / "ends.bin", *data.stores[0].directory.glob("shards/*/documents.arrow")]
    for victim in victims:
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.with_name("copy").write_bytes(content)
        victim.with_name("copy").replace(victim)
    _, damage = verify_all(root)
    assert len(damage) == 2 and all(any(str(victim) in sentence for sentence in damage) for victim in victims)


def test_tokenizer_larger_than_the_embedding_is_refused_before_tokenizing(configure, tmp_path):
    trained = prepare_tokenizer(configure(tokenizer="bpe:300"), progress=False)
    shutil.copy(trained.path, tmp_path / "tokenizer.json")
    config = configure(tokenizer=str(tmp_path / "tokenizer.json"), directory=str(tmp_path / "fresh"))
    config = dataclasses.replace(config, model=ModelConfig(vocab_size=270))
    with pytest.raises(ConfigError, match="300 tokens, more than model.vocab_size=270"):
        open_data(config, progress=False)
    assert not (tmp_path / "fresh/stores").exists()


def test_directory_that_cannot_be_written_is_named(configure, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="Cannot write .*file.*--data.directory"):
        open_data(configure(directory=str(tmp_path / "file")), progress=False)


def test_bpe_sees_training_text_only(configure, corpus):
    tokenizer = prepare_tokenizer(configure(tokenizer="bpe:300"), progress=False)
    prepared = open_data(configure(), progress=False)
    for name in ids_of(prepared.stores[0], prepared.held_out_plans[0].documents):
        size = (corpus / name).stat().st_size
        (corpus / name).write_bytes((b"zqx" * size)[:size])
    assert prepare_tokenizer(configure(tokenizer="bpe:300"), progress=False).vocab_size == tokenizer.vocab_size
    first, second = sorted((corpus.parent / "prepared/tokenizers").glob("*.json"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    "fraction, words", [(0.99999, "no documents for training"), (0.00001, "no documents held out")]
)
def test_a_source_without_documents_in_one_split_is_refused(configure, fraction, words):
    with pytest.raises(ConfigError, match=words):
        open_data(configure(held_out_fraction=fraction), progress=False)


def test_progress_is_shown_on_the_error_stream_while_preparing_only(configure, capsys):
    open_data(configure(tokenizer="bpe:300"))
    shown = capsys.readouterr()
    assert "Tokenizing corpus" in shown.err and shown.out == ""
    open_data(configure(tokenizer="bpe:300"))
    assert capsys.readouterr().err == ""


def test_a_run_goes_on_with_the_data_it_recorded_whatever_becomes_of_its_sources(configure, corpus, tmp_path):
    config, workdir = configure(), tmp_path / "run"
    first = open_data(config, progress=False, workdir=workdir)
    workdir.mkdir()
    (workdir / "data.json").write_text(json.dumps(first.describe()))
    (corpus / "new.py").write_text("something new")
    again = open_data(config, progress=False, workdir=workdir)
    assert again.content_hash == first.content_hash
    assert_same(again.batch(5), first.batch(5))
    assert first.compression() == again.compression() != {}
    shutil.rmtree(tmp_path / "prepared")  # without what it recorded, it takes the sources as they are
    assert open_data(config, progress=False, workdir=workdir).content_hash != first.content_hash


def test_a_run_whose_prepared_data_is_elsewhere_is_told_where_it_was(configure, tmp_path):
    data = open_data(configure(), progress=False)
    record = data.describe()["record"]
    shutil.move(tmp_path / "prepared", tmp_path / "moved")
    with pytest.raises(ConfigError, match="prepared, where this run's tokens and plans were kept, is not here"):
        reopen(data.config, record, data.tokenizer)


def recorded_run(data, workdir):
    workdir.mkdir()
    (workdir / "data.json").write_text(json.dumps(data.describe()))
    shutil.copy(data.tokenizer.path, workdir / "tokenizer.json")
    return workdir


def test_a_runs_tokenizer_that_is_gone_or_another_is_refused_and_not_taken_for_bytes(configure, tmp_path):
    config = configure(tokenizer="bpe:300")
    workdir = recorded_run(open_data(config, progress=False), tmp_path / "run")
    path = workdir / "tokenizer.json"
    whole = path.read_text("utf-8")
    for content, words in (
        (None, "missing: it held"),
        (whole[:100], "damaged: it held"),
        (whole + " ", "not"),
    ):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content, "utf-8")
        with pytest.raises(ConfigError, match=f"tokenizer.json is {words} the tokenizer that this run's tokens"):
            open_data(config, progress=False, workdir=workdir)


@pytest.mark.parametrize("name", ["documents.bin", "row_offsets.bin", "plan.json"])
def test_a_byte_of_a_plan_that_changed_stops_a_run_before_it_reads_another_batch(configure, tmp_path, name):
    config = configure(tokenizer="bpe:300")
    data = open_data(config, progress=False)
    workdir = recorded_run(data, tmp_path / "run")
    (plan,) = data.plans.values()
    path = plan.directory / name
    content = bytearray(path.read_bytes())
    place = content.index(b'"rows": ') + 8 if name == "plan.json" else len(content) // 2
    content[place] ^= 1
    path.with_name("copy").write_bytes(content)  # The open plan keeps the old file.
    path.with_name("copy").replace(path)
    for open_again in (lambda: open_data(config, progress=False, workdir=workdir), lambda: open_data(config, False)):
        with pytest.raises(ConfigError, match=f"{name} is damaged.*Delete .*prepare"):
            open_again()


def test_only_so_much_held_out_text_is_taken_as_is_asked_for_spread_evenly(configure):
    data = open_data(configure(held_out_fraction=0.5), progress=False)
    whole = data.held_out_text()
    assert data.compression() == compressors(whole)
    (path,) = Path(data.config.data.directory, "held_out").iterdir()
    path.write_text('{"gzip_bits_per_byte": 1.0}')
    assert data.compression() == {"gzip_bits_per_byte": 1.0}
    path.unlink()  # as in data that an earlier version has prepared
    assert data.compression() == compressors(whole)
    part = data.held_out_text(most_bytes=len(whole) // 3)
    assert 0 < len(part) < 0.7 * len(whole) and part[:50] == whole[:50]
