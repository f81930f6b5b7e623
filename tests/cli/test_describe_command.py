"""`opendeep describe` says what a run is and takes, and counts what the run itself would."""

import json
import re

import pytest

from opendeep_jax.cli import describe
from opendeep_jax.cli.main import main
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_recipe, load_run_config
from opendeep_jax.models.accounting import count_parameters
from opendeep_jax.models.parameters import model_definition
from opendeep_jax.plan.describe import parameter_parts


def described(capsys, *argv) -> dict:
    assert main(["describe", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("recipe", ["quickstart", "gpt_oss:20b", "nemotron_h"])
def test_the_parts_of_a_model_are_all_of_it(recipe):
    config = load_recipe(recipe).model
    parts, count = parameter_parts(config, model_definition(config).shapes()), count_parameters(config)
    biases = config.num_moe_layers * config.moe.num_experts  # router biases are no parameters
    assert "other" not in parts and 0 < len(parts)
    assert sum(part["total"] for part in parts.values()) - count.total - count.mtp in (
        0,
        biases,
        biases + config.moe.num_experts,
    )
    assert sum(part["active"] for part in parts.values()) - count.active in (0, biases)


def test_a_recipe_is_described_with_its_overrides_and_layout(capsys):
    run = described(
        capsys, "--config=deepseek_v3", "--devices=512", "--model.num_layers=8", "--optimizer.warmup_steps=10"
    )
    count = count_parameters(load_recipe("deepseek_v3").model)
    assert run["name"] == "deepseek_v3" and run["model"]["layers"] == 8
    assert run["parameters"]["total"] < count.total and run["parameters"]["mtp"] == count.mtp
    parts = run["parameters"]["parts"].values()
    assert sum(part["total"] for part in parts) == run["parameters"]["total"] + run["parameters"]["mtp"]
    assert sum(part["active"] for part in parts) == run["parameters"]["active"]
    assert run["memory"]["mesh"] == {"fsdp": 64, "expert": 8}
    state = run["memory"]["state_bytes_per_device"]
    weights = 4 * (run["parameters"]["total"] + run["parameters"]["mtp"]) / 512
    assert 2 * weights <= state < 4 * weights  # bfloat16 moments; what is no expert is divided over fsdp alone
    assert sum(batch["steps"] for batch in run["schedule"]["batches"]) == run["schedule"]["steps"]
    tokens = sum(batch["steps"] * batch["tokens_per_step"] for batch in run["schedule"]["batches"])
    assert tokens == run["schedule"]["tokens"] >= 14.8e12
    assert run["data"]["sources"][0]["path"] == "corpus/**/*.jsonl"


def test_a_runs_directory_is_described_as_it_was_configured(small_run, capsys):
    run, config = described(capsys, f"--workdir={small_run}", "--devices=8"), load_run_config(small_run)
    assert run["name"] == config.name and run["schedule"]["steps"] == config.train.steps
    assert run["data"]["prepared_tokens"] > 0


def test_a_recipe_is_not_described_with_the_text_of_a_run(tmp_path, capsys):
    (tmp_path / "data.json").write_text(json.dumps({"train_tokens": 5, "vocab_size": 300}))
    run = described(capsys, "--config=quickstart", f"--workdir={tmp_path}")
    assert run["data"]["prepared_tokens"] is None and run["data"]["vocab_size"] is None


def test_the_table_has_aligned_columns_and_names_every_part(capsys):
    assert main(["describe", "--config=quickstart"]) == 0
    out = capsys.readouterr().out
    for words in ("quickstart\n", "context length", "routed experts", "active per token", "moments", "FLOPs a step",
                  "the Python sources of this interpreter (license: PSF-2.0)", "140 steps"):  # fmt: skip
        assert words in out
    columns = {match.end() for match in re.finditer(r"^  (?=\S)(?:\S+ )*\S+ {2,}(?=\S)", out, flags=re.MULTILINE)}
    assert max(map(len, out.splitlines())) < 130 and columns


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["--config=quickstrat"], "Did you mean quickstart?"),
        ([], "--config is missing"),
        (["--workdir=nowhere"], "there is no such directory"),
        (["--config=quickstart", "--devices=0"], "must be at least 1"),
        (["--config=quickstart", "--devices=many"], "See opendeep describe --help"),
        (["--config=quickstart", "--devices=3", "--parallel.fsdp=4"], "takes 4 devices"),
        (["--config=quickstart", "--model.layers=3"], "--model.num_layers"),
    ],
)
def test_what_cannot_be_described_is_refused(argv, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        describe.main(argv)
    assert list(tmp_path.iterdir()) == []
