"""Names from other programs are answered with ours, and every name of ours in the tables is one."""

import re

import pytest

from opendeep_jax.cli import chat, checkpoints, evaluate, export, generate, launch, plan, sweep, watch
from opendeep_jax.cli import main as cli
from opendeep_jax.config import synonyms
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.overrides import _leaves, resolve
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.config.synonyms import COMMANDS, SETTINGS, TARGETS, known_synonym


@pytest.mark.parametrize(
    "argument, answer",
    [
        ("--lr=1", "--optimizer.learning_rate?"),
        ("--batch_size=1", "--train.batch_size?"),
        ("--batch-size=1", "--train.batch_size?"),
        ("--seq_len=1", "--data.sequence_length?"),
        ("--epochs=1", "--train.steps? A run's length is counted in steps"),
        ("--steps=1", "--train.steps?"),
        ("--max_steps=1", "--train.steps?"),
        ("--output_dir=x", "--workdir?"),
        ("--out_dir=x", "--workdir?"),
        ("--model.layers=1", "--model.num_layers?"),
        ("--model.n_layers=1", "--model.num_layers?"),
        ("--d_model=1", "--model.hidden_size?"),
        ("--heads=1", "--model.attention.num_heads?"),
        ("--warmup=1", "--optimizer.warmup_steps?"),
        ("--grad_clip=1", "--optimizer.clip_norm?"),
        ("--gradient_accumulation_steps=1", "--train.accumulation_steps?"),
        ("--dataset=x", "--data.sources.0.path?"),
        ("--data=x", "--data.sources.0.path?"),
        ("--resume_from_checkpoint=x", "--workdir?"),
        ("--optimizer=adam", "--optimizer.kind?"),
        ("--tp=2", "--parallel.tensor?"),
        ("--bf16=true", "--model.dtype?"),
        ("--gradient_checkpointing=1", "--model.remat.moe?"),
        ("--save_steps=1", "--checkpoint.every?"),
        ("--wandb=1", "--tracking.trackers?"),
        ("--LR=1", "--optimizer.learning_rate?"),
        ("--train.epochs=1", "--train.steps?"),
    ],
)
def test_a_setting_by_its_name_elsewhere_is_answered_with_ours(argument, answer):
    with pytest.raises(ConfigError, match=re.escape(f"there is no such setting. Did you mean {answer}")):
        resolve(["--config=quickstart", argument])


@pytest.mark.parametrize(
    "module, argv, answer",
    [
        (generate, ["--workdir=a", "--max_new_tokens=3"], "--max_tokens?"),
        (generate, ["--workdir=a", "--num_samples=3"], "--n?"),
        (export, ["hf", "--workdir=a", "--output_dir=b"], "--out?"),
        (evaluate, ["--workdir=a", "--benchmark=b"], "--tasks?"),
        (chat, ["--model_path=a"], "--model?"),
        (watch, ["--workdir=a", "--interval=3"], "--every?"),
        (watch, ["--workdir=a", "--evrey=3"], "--every?"),
    ],
)
def test_a_commands_flag_by_its_name_elsewhere_is_answered_with_ours(module, argv, answer):
    with pytest.raises(ConfigError, match=re.escape(f"Did you mean {answer}")):
        module.main(argv)


@pytest.mark.parametrize(
    "word", ["kubernetes", "k8s", "gke", "GKE", "sky", "gcp", "sbatch", "localhost", "slrum", "skypilto"]
)
def test_a_target_by_its_name_elsewhere_is_answered_with_ours(word):
    expected = {"sky": "skypilot", "gcp": "tpu-vm", "sbatch": "slurm", "localhost": "local", "slrum": "slurm",
                "skypilto": "skypilot"}.get(word, "gke-tpu or gke-gpu")  # fmt: skip
    with pytest.raises(
        ConfigError, match=re.escape(f"--target={word}: there is no such target. Did you mean {expected}?")
    ):
        launch.main([f"--target={word}", "--config=quickstart"])


@pytest.mark.parametrize(
    "word, command",
    [("finetune", "train"), ("infer", "generate"), ("monitor", "watch"), ("info", "describe"), ("convert", "import"),
     ("evaluate", "eval"), ("k8s", "launch"), ("trian", "train"), ("plna", "plan")],
)  # fmt: skip
def test_a_command_by_its_name_elsewhere_is_answered_with_ours(word, command, capsys):
    assert cli.main([word]) == 2
    assert f"there is no command {word}. Did you mean {command}?" in capsys.readouterr().err


def test_every_name_in_the_tables_is_one_and_none_is_given_two_meanings():
    fields = {name for name, _ in _leaves(RunConfig, RunConfig())} | {"config", "workdir"}
    helps = plan.HELP + sweep.HELP + launch.HELP + checkpoints.HELP
    flags = set(re.findall(r"--([a-z_]+)", helps)) | {"out", "prompt", "temperature", "model", "n", "port", "tasks"}
    flags |= {"max_tokens", "step", "every", "html", "once"}
    assert {name for name in SETTINGS if name not in fields and name not in flags} <= {"sweep.optimizer.learning_rate"}
    assert set(COMMANDS) <= set(cli.COMMANDS)
    assert not {other for others in COMMANDS.values() for other in others.split()} & set(cli.COMMANDS)
    taken = [other for name, others in SETTINGS.items() if name in fields for other in others.split()]
    assert sorted({other for other in taken if taken.count(other) > 1}) == []
    assert not set(taken) & (fields - {"data", "optimizer"})
    targets = [other for others in TARGETS.values() for other in others.split()]
    assert len(set(targets)) == len(targets)


def test_a_name_that_nobody_has_is_left_alone():
    assert known_synonym("--zzz", SETTINGS) == "" and synonyms.known_synonym("", COMMANDS) == ""
