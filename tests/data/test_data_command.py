import json
import os
import shutil
from pathlib import Path

import pytest
from small_corpus import write_corpus

from opendeep_jax.cli.data import main
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import save_run_config
from opendeep_jax.config.schema import SourceConfig
from opendeep_jax.data.opening import open_data


@pytest.fixture
def recipe(tmp_path, corpus):
    path = tmp_path / "recipe.py"
    path.write_text(f"""
from opendeep_jax.config.schema import DataConfig, RunConfig, SourceConfig

def get_config():
    source = SourceConfig("corpus", {str(corpus)!r})
    return RunConfig(data=DataConfig((source,), directory={str(tmp_path / "data")!r}, held_out_fraction=0.2))
""")
    return path


def test_tokenizer_is_trained_and_described(recipe, capsys):
    main(["tokenizer", f"--config={recipe}", "--data.tokenizer=bpe:300"])
    described = json.loads(capsys.readouterr().out)
    assert described["vocab_size"] == 300 and described["bos_id"] == 1
    assert json.loads(Path(described["path"]).read_text("utf-8"))["model"]["type"] == "BPE"


def test_prepare_counts_the_tokens(recipe, capsys):
    main(["prepare", f"--config={recipe}", "--data.tokenizer=bytes", "--data.sources.0.epochs=1000"])
    assert json.loads(capsys.readouterr().out)["train_tokens"] > 1000


def test_where_lists_the_documents_of_a_step(configure, tmp_path, capsys):
    save_run_config(configure(), configure(), tmp_path)
    main(["where", f"--workdir={tmp_path}", "--step=2"])
    pieces = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {piece["row"] for piece in pieces} == {0, 1, 2, 3}


def test_where_and_when_go_by_what_the_run_was_trained_on_whatever_becomes_of_its_sources(
    configure, corpus, tmp_path, capsys
):
    save_run_config(configure(), configure(), tmp_path)
    (tmp_path / "data.json").write_text(json.dumps(open_data(configure(), progress=False).describe()))
    main(["where", f"--workdir={tmp_path}", "--step=5", "--row=2"])
    before = capsys.readouterr().out
    shutil.rmtree(corpus)
    main(["where", f"--workdir={tmp_path}", "--step=5", "--row=2"])
    assert capsys.readouterr().out == before and before
    piece = json.loads(before.splitlines()[0])
    main(["when", f"--workdir={tmp_path}", f"--doc={piece['id']}"])
    seen = json.loads(capsys.readouterr().out)["seen"]
    assert {"step": 5, "row": 2, **{key: piece[key] for key in ("first_token", "end_token")}} in seen


def test_a_recipe_can_be_looked_into_before_it_is_trained(recipe, capsys):
    repeated = ["--data.tokenizer=bytes", "--data.sources.0.epochs=1000"]
    main(["where", f"--config={recipe}", *repeated, "--step=1", "--row=0", "--format=text"])
    shown = capsys.readouterr().out
    assert "row 0  corpus  part" in shown and "license unknown" in shown and "  | " in shown
    document = shown.split()[3]
    main(["when", f"--config={recipe}", *repeated, f"--doc={document}", "--format=text"])
    assert "will be seen" in capsys.readouterr().out


def test_verify_says_what_is_damaged_and_gives_status_1(recipe, tmp_path, capsys):
    arguments = [f"--config={recipe}", "--data.tokenizer=bytes", "--data.sources.0.epochs=1000"]
    main(["prepare", *arguments])
    assert main(["verify", *arguments]) == 0 and main(["verify", f"--directory={tmp_path / 'data'}"]) == 0
    (plan,) = (tmp_path / "data/plans").glob("*train*")
    (plan / "ends.bin").unlink()
    capsys.readouterr()
    assert main(["verify", f"--directory={tmp_path / 'data'}"]) == 1
    assert "ends.bin is damaged: missing. Delete" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="holds no prepared data"):
        main(["verify", f"--directory={tmp_path / 'nothing'}"])


def test_diff_compares_two_mixtures(configure, corpus, tmp_path, capsys):
    sides = []
    for name, weight in (("a", 1.0), ("b", 3.0)):
        other = write_corpus(tmp_path / f"other_{name}", 25, salt=ord(name))
        config = configure(
            sources=(
                SourceConfig("corpus", str(corpus), epochs=1000.0),
                SourceConfig("other", str(other), weight, epochs=1000.0),
                *([SourceConfig("new", str(corpus), epochs=1000.0)] if name == "b" else []),
            )
        )
        sides.append(tmp_path / f"run_{name}")
        sides[-1].mkdir()
        save_run_config(config, config, sides[-1])
        (sides[-1] / "data.json").write_text(json.dumps(open_data(config, progress=False).describe()))
    main(["diff", *map(str, sides)])
    same, other, new = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert same["same_tokens"] and same["share"] == [0.5, 0.2] and same["only_in_a"] == same["only_in_b"] == 0
    assert not other["same_tokens"] and other["share"] == [0.5, 0.6] and other["only_in_a"] == 25
    assert new["in"] == "b" and new["documents"] == [0, 30] and new["only_in_b"] == 30
    main(["diff", *map(str, sides), "--format=text"])
    assert "the same tokens in both" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="compares two runs or recipes, and 1 are given"):
        main(["diff", str(sides[0])])


def test_help_and_wrong_commands(capsys):
    main([])
    assert "opendeep data where" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="prepare"):
        main(["prepar"])
    with pytest.raises(ConfigError, match="--step=-1"):
        main(["where", "--workdir=x", "--step=-1"])


def test_a_runs_data_is_made_again_from_sources_that_were_touched_since(configure, corpus, tmp_path, capsys):
    config = configure()
    data = open_data(config, progress=False)
    save_run_config(config, config, tmp_path)
    (tmp_path / "data.json").write_text(json.dumps(data.describe()))
    (store,), (plan,) = data.stores, data.plans.values()
    for path in corpus.rglob("*.py"):
        os.utime(path, (1, 1))
    shutil.rmtree(store.directory / "shards/00000000")
    shutil.rmtree(plan.directory)
    main(["prepare", f"--workdir={tmp_path}"])
    assert json.loads(capsys.readouterr().out)["content_hash"] == data.content_hash
    assert main(["verify", f"--workdir={tmp_path}"]) == 0
    assert len(list((tmp_path / "prepared/stores").iterdir())) == 1
    next(corpus.rglob("*.py")).write_text("something else")
    shutil.rmtree(store.directory / "shards/00000000")
    with pytest.raises(ConfigError, match="has changed since"):
        main(["prepare", f"--workdir={tmp_path}"])


@pytest.fixture
def odd(tmp_path) -> list[str]:
    """Arguments for a directory of records with other files in it."""
    (tmp_path / "odd").mkdir()
    (tmp_path / "recipe.py").write_text(
        "from opendeep_jax.config.schema import RunConfig\n\ndef get_config():\n    return RunConfig()\n"
    )
    (tmp_path / "odd/a.jsonl").write_text("".join(f'{{"text": "text {i} {"x" * 600}"}}\n' for i in range(100)))
    for name in ("all.zip", "page.html", "README.md"):
        (tmp_path / "odd" / name).write_text("x")
    data = ["tokenizer=bytes", f"directory={tmp_path / 'data'}", f"sources.0.path={tmp_path / 'odd'}"]
    run = ["train.steps=2", "train.batch_size=2", "optimizer.warmup_steps=0", *(f"data.{each}" for each in data)]
    return [f"--config={tmp_path / 'recipe.py'}", *(f"--{each}" for each in run)]


UNREAD = {
    "archive (.zip), which must be unpacked": 1,
    "file ending in .html, which is not read": 1,
    "text about the records": 1,
}


def test_files_that_are_not_read_and_unknown_licenses_are_said(odd, tmp_path, capsys, caplog):
    main(["prepare", *odd])
    described = json.loads(capsys.readouterr().out)
    assert described["left_out"] == {f"odd: {reason}": number for reason, number in UNREAD.items()}
    assert described["train_documents"] + described["held_out_documents"] == 100
    assert (described["sources"][0]["name"], described["sources"][0]["license"]) == ("odd", "unknown")
    assert "1 × archive (.zip), which must be unpacked, as all.zip" in caplog.text
    assert "its license is unknown. Say what it is with --data.sources.0.license=NAME" in caplog.text
    main(["card", *odd, f"--out={tmp_path / 'card'}"])
    card = json.loads((tmp_path / "card/card.json").read_text())["sources"][0]
    assert {reason: counts["documents"] for reason, counts in card["dropped"].items()} == UNREAD
    assert card["license"] == "unknown" and "PSF" not in (tmp_path / "card/card.md").read_text()
    caplog.clear()
    main(["prepare", *odd, "--data.sources.0.license=CC0-1.0"])
    assert "license" not in caplog.text


def test_a_source_that_cannot_be_divided_is_refused_before_anything_is_tokenized(odd, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("A single book of one's own. " * 400)
    arguments = ["prepare", *odd, f"--data.sources.1.path={tmp_path / 'book.txt'}"]
    with pytest.raises(ConfigError, match=r"'book' .* no documents held out.*held_out_end=0.05.*0 holds nothing out"):
        main(arguments)
    assert not (tmp_path / "data/stores").exists()
    for cure, documents in (("sources.1.held_out_end=0.05", 102), ("held_out_fraction=0", 101)):
        main([*arguments, f"--data.{cure}"])
        described = json.loads(capsys.readouterr().out)
        assert described["train_documents"] + described["held_out_documents"] == documents


def test_a_run_that_began_with_rounded_weights_keeps_them(configure, tmp_path):
    config = configure()
    data = open_data(config, progress=False, workdir=tmp_path)
    record = data.describe()["record"]
    assert record["exact_mixture"] and data.order.exact and data.compression()
    del record["exact_mixture"]
    (tmp_path / "data.json").write_text(json.dumps({"record": record}))
    assert not open_data(config, progress=False, workdir=tmp_path).order.exact
    shutil.rmtree(tmp_path / "prepared")
    assert not open_data(config, progress=False, workdir=tmp_path).order.exact
