import json
from pathlib import Path

import pytest

from opendeep_jax.cli.data import main
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import save_run_config
from opendeep_jax.data.pipeline import open_data


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
    main(["prepare", f"--config={recipe}", "--data.tokenizer=bytes"])
    assert json.loads(capsys.readouterr().out)["train_tokens"] > 1000


def test_where_lists_the_documents_of_a_step(configure, tmp_path, capsys):
    save_run_config(configure(), configure(), tmp_path)
    main(["where", f"--workdir={tmp_path}", "--step=2"])
    pieces = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {piece["row"] for piece in pieces} == {0, 1, 2, 3}


def test_where_refuses_other_text_than_the_run_was_trained_on(configure, corpus, tmp_path, capsys):
    save_run_config(configure(), configure(), tmp_path)
    described = open_data(configure(), progress=False).describe()
    (tmp_path / "data.json").write_text(json.dumps(described))
    main(["where", f"--workdir={tmp_path}"])
    assert capsys.readouterr().out
    (corpus / "new.py").write_text("something new")
    with pytest.raises(ConfigError, match=f"trained on {described['train_tokens']:,} tokens.*Bring the sources back"):
        main(["where", f"--workdir={tmp_path}"])


def test_help_and_wrong_commands(capsys):
    main([])
    assert "opendeep data where" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="prepare"):
        main(["prepar"])
    with pytest.raises(ConfigError, match="--step=-1"):
        main(["where", "--workdir=x", "--step=-1"])
