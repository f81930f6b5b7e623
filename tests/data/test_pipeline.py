import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
from small_corpus import write_corpus

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import ModelConfig, RampStage, SourceConfig
from opendeep_jax.data.pipeline import open_data, prepare_tokenizer


def assert_same(one, two):
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(two, field.name), field.name)


def two_sources(tmp_path, corpus):
    other = write_corpus(tmp_path / "other", 25, salt=5)
    return SourceConfig("corpus", str(corpus), weight=3.0), SourceConfig("other", str(other), weight=1.0)


def test_batches_are_integers_of_the_configured_shape(configure):
    batch = open_data(configure(), progress=False).batch(0)
    for field in dataclasses.fields(batch):
        array = getattr(batch, field.name)
        assert array.shape == (4, 32) and array.dtype == (np.bool_ if field.name == "loss_mask" else np.int32)


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
        parts = [data.batch(step, i, processes) for i in range(processes)]
        whole = data.batch(step)
        for field in dataclasses.fields(whole):
            joined = np.concatenate([getattr(part, field.name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, field.name))
    streams = [data.iterate(5, i, processes) for i in range(processes)]
    np.testing.assert_array_equal(np.concatenate([next(s).tokens for s in streams]), data.batch(5).tokens)


def test_batch_that_cannot_be_divided_over_the_processes_is_refused(configure):
    with pytest.raises(ConfigError, match="4 rows .* 3 processes"):
        open_data(configure(), progress=False).batch(0, 0, 3)


def test_batch_size_ramp_takes_the_same_rows_in_smaller_batches(configure):
    ramped = open_data(configure(ramp=(RampStage(2, tokens=3 * 2 * 32),)), progress=False)
    plain = open_data(configure(batch_size=2), progress=False)
    assert [len(ramped.batch(step).tokens) for step in range(5)] == [2, 2, 2, 4, 4]
    rows = np.concatenate([ramped.batch(step).tokens for step in range(5)])
    np.testing.assert_array_equal(rows, np.concatenate([plain.batch(step).tokens for step in range(7)]))


def test_an_epoch_trains_on_every_training_document_and_no_held_out_one(configure):
    data = open_data(configure(), progress=False)
    steps = -(-data.train_rows[0].rows_per_epoch // 4)
    documents = {piece["document"] for step in range(steps) for piece in data.where(step)}
    assert documents == set(data.stores["train"][0].names)
    assert documents.isdisjoint(data.stores["held_out"][0].names)


def test_where_names_the_documents_of_a_batch(configure, corpus):
    data = open_data(configure(), progress=False)
    batch = data.batch(3)
    for row, pieces in itertools.groupby(data.where(3), lambda piece: piece["row"]):
        text = b""
        for piece in pieces:
            whole = (corpus / piece["document"]).read_bytes()
            text += whole[max(0, piece["first_token"] - 1) : piece["end_token"] - 1]
        tokens = [*batch.tokens[row][batch.segment_ids[row] > 0], batch.targets[row][batch.segment_ids[row] > 0][-1]]
        assert bytes(int(t) for t in tokens if t < 256) == text


def test_held_out_batches_cover_the_held_out_text_once(configure, tmp_path, corpus):
    data = open_data(configure(sources=two_sources(tmp_path, corpus), tokenizer="bpe:300"), progress=False)
    batches = data.held_out(3)
    assert data.held_out_text and len(batches[0].tokens) == 3 == len(batches[-1].tokens)
    targets = np.concatenate([batch.targets[batch.loss_mask] for batch in batches])
    assert data.tokenizer.token_bytes[targets].sum() == len(data.held_out_text)
    assert data.tokenizer.decode(targets).encode() == data.held_out_text
    assert not batches[-1].loss_mask[batches[-1].segment_ids == 0].any()
    parts = [data.held_out(4, process_index=i, process_count=2)[1].tokens for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts), data.held_out(4)[1].tokens)
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
    assert len(data.held_out(4)) == 0 and data.held_out_text == b""


def test_sources_are_mixed_by_weight(configure, tmp_path, corpus):
    data = open_data(configure(sources=two_sources(tmp_path, corpus)), progress=False)
    rows = {(step, piece["row"]): piece["source"] for step in range(25) for piece in data.where(step)}
    assert sum(source == "corpus" for source in rows.values()) == 75


def test_summary_counts_what_is_there(configure, corpus):
    (corpus / "latin.txt").write_bytes("é".encode("latin-1"))
    summary = open_data(configure(), progress=False).describe()
    assert summary["train_documents"] + summary["held_out_documents"] == 30
    assert summary["train_tokens"] == summary["train_bytes"] + 2 * summary["train_documents"]
    assert summary["skipped"] == ["corpus: latin.txt"]
    assert summary["sources"][0]["license"] == "CC0-1.0" and summary["sources"][0]["share"] == 1
    json.dumps(summary)


def test_prepared_data_is_opened_and_not_made_again(configure, monkeypatch):
    config = configure(tokenizer="bpe:300")
    first = open_data(config, progress=False)
    for name in ("sources.read_bytes", "tokenizer.train_bpe", "pipeline.write_store"):
        monkeypatch.setattr(f"opendeep_jax.data.{name}", lambda *args, **kwargs: pytest.fail("made again"))
    assert open_data(config, progress=False).content_hash == first.content_hash


def test_changed_text_is_tokenized_again(configure, corpus):
    first = open_data(configure(), progress=False)
    (corpus / "new.py").write_text("something new")
    assert open_data(configure(), progress=False).content_hash != first.content_hash


def test_damaged_store_is_made_again_with_a_message(configure, caplog):
    first = open_data(configure(), progress=False)
    path, batch = first.stores["train"][0].directory / "tokens.bin", first.batch(0)
    shutil.copy(path, path.with_name("copy"))  # The open store keeps the old file; cutting it off would be its end.
    with open(path.with_name("copy"), "rb+") as file:
        file.truncate(100)
    path.with_name("copy").replace(path)
    again = open_data(configure(), progress=False)
    assert again.content_hash == first.content_hash and "Tokenizing corpus again" in caplog.text
    assert_same(again.batch(0), batch)


def test_tokenizer_larger_than_the_embedding_is_refused_before_tokenizing(configure, tmp_path):
    trained = prepare_tokenizer(configure(tokenizer="bpe:300").data, progress=False)
    shutil.copy(trained.path, tmp_path / "tokenizer.json")
    config = configure(tokenizer=str(tmp_path / "tokenizer.json"), directory=str(tmp_path / "fresh"))
    config = dataclasses.replace(config, model=ModelConfig(vocab_size=270))
    with pytest.raises(ConfigError, match="300 tokens, more than model.vocab_size=270"):
        open_data(config, progress=False)
    assert not (tmp_path / "fresh/tokens").exists()


def test_directory_that_cannot_be_written_is_named(configure, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="Cannot write .*file.*--data.directory"):
        open_data(configure(directory=str(tmp_path / "file")), progress=False)


def test_bpe_sees_training_text_only(configure, corpus):
    tokenizer = prepare_tokenizer(configure(tokenizer="bpe:300").data, progress=False)
    held_out = open_data(configure(), progress=False).stores["held_out"][0].names
    for name in held_out:
        (corpus / name).write_bytes(b"zqx" * 300)
    assert prepare_tokenizer(configure(tokenizer="bpe:300").data, progress=False).vocab_size == tokenizer.vocab_size
    first, second = sorted((corpus.parent / "prepared/tokenizers").glob("*.json"))
    assert first.read_bytes() == second.read_bytes()


def test_progress_is_shown_on_the_error_stream_while_preparing_only(configure, capsys):
    open_data(configure(tokenizer="bpe:300"))
    shown = capsys.readouterr()
    assert "Tokenizing corpus" in shown.err and shown.out == ""
    open_data(configure(tokenizer="bpe:300"))
    assert capsys.readouterr().err == ""
