"""`opendeep import` and `opendeep export`: round trips, refusals, and every command and program of docs/weights.md."""

import contextlib
import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import yaml
from small_models import DENSE, random_model, write_text

import opendeep_jax
from opendeep_jax.checkpoint.checkpoints import load_model
from opendeep_jax.cli import export, import_, train
from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import load_run_config, save_run_config
from opendeep_jax.config.overrides import apply
from opendeep_jax.config.schedule import tokens_before
from opendeep_jax.config.schema import RopeConfig, RunConfig
from opendeep_jax.interop import load_hf, save_hf
from opendeep_jax.interop.gguf import load_gguf, read_gguf, save_gguf
from opendeep_jax.models.parameters import split
from opendeep_jax.pretrained.sources import open_tokenizer
from opendeep_jax.record.origin import write_origin
from opendeep_jax.record.workdir import check_workdir
from opendeep_jax.text.files import byte_tokenizer, save_tokenizer, tokenizer_from_hf
from opendeep_jax.text.gguf_tokenizer import gguf_fields_of

PAGE = (Path(opendeep_jax.__file__).parent.parent / "docs/weights.md").read_text("utf-8")
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
CONFIG = dataclasses.replace(
    DENSE,
    vocab_size=264,
    dtype="float32",
    attention=dataclasses.replace(DENSE.attention, rope=RopeConfig(interleaved=False)),
)


def arrays(model) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in split(model)[1].items()}


def same(one, other) -> bool:
    one, other = arrays(one), arrays(other)
    return set(one) == set(other) and all((one[name] == other[name]).all() for name in one)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small Llama that talks in bytes, and its GGUF."""
    model = random_model(CONFIG)
    tokenizer = dataclasses.replace(byte_tokenizer(), chat_template=TEMPLATE)
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    save_gguf(model, path, "f32", gguf_fields_of(tokenizer, 264))
    return model, path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_weights_go_through_every_format_unchanged(small):
    model, path = small
    import_.main(["gguf", str(path), "--out=run", "--model.dtype=float32"])
    assert same(model, load_model("run")[0])
    export.main(["hf", "--workdir=run", "--out=hub", "--dtype=float32"])
    assert same(model, load_hf("hub"))
    assert tokenizer_from_hf("hub").apply_chat([{"content": "Hi"}]) == "Hi\n"
    import_.main(["hf", "hub", "--out=again"])
    assert same(model, load_model("again")[0])
    export.main(["gguf", "--workdir=again", "--out=files/last.gguf", "--type=f32", "--name=Last"])
    assert same(model, load_gguf("files/last.gguf"))
    first, last = read_gguf(path).fields, dict(read_gguf("files/last.gguf").fields)
    assert last.pop("general.name") == "Last"
    assert first == last


def test_without_a_recipe_rows_are_no_longer_than_the_model_reads():
    tokenizer = byte_tokenizer()
    model = random_model(dataclasses.replace(CONFIG, context_length=48))
    save_gguf(model, Path("short.gguf"), "f32", gguf_fields_of(tokenizer, 264))
    import_.main(["gguf", "short.gguf", "--out=run"])
    assert load_run_config("run").data.sequence_length == 48
    with pytest.raises(ConfigError, match="model.context_length = 48: the run trains rows of 64"):
        import_.main(["gguf", "short.gguf", "--out=longer", "--data.sequence_length=64"])


def test_an_imported_run_trains_on_with_what_was_said_at_the_import(small, capsys):
    Path("corpus").mkdir()
    write_text(Path("corpus"))
    settings = (
        "--model.dtype=float32 --train.batch_size=8 --train.loss_chunk=32 --train.sample_every=0 "
        "--train.compilation_cache= --data.sequence_length=32 --data.directory=data --evaluation.every=0 "
        "--optimizer.warmup_steps=1 --evaluation.final_batches=1 "
        "--data.held_out_fraction=0.3 --checkpoint.every=0"
    )
    import_.main(["gguf", str(small[1]), "--out=run", *shlex.split(settings)])
    said = capsys.readouterr().out
    assert "opendeep train --config=run/recipe.py --workdir=run --data.sources.0.path=" in said
    with pytest.raises(ConfigError, match=r"corpus/\*\*/\*\.jsonl"):  # and not the Python library, in silence
        train.main(["--config=run/recipe.py", "--workdir=run"])
    train.main(["--config=run/recipe.py", "--workdir=run", "--data.sources.0.path=corpus", "--train.steps=2"])
    assert "resuming from step 0" in capsys.readouterr().out
    trained, config = load_model("run")
    assert config == load_run_config("run") and config.train.steps == 2 and config.name == "small/run"
    with pytest.raises(ConfigError, match="holds a run with another configuration"):  # from here on its text is fixed
        check_workdir(dataclasses.replace(config, seed=1), "run")
    assert not same(small[0], trained)
    export.main(["gguf", "--workdir=run", "--out=before.gguf", "--step=0", "--type=f32"])
    assert same(small[0], load_gguf("before.gguf"))


def front(directory: str) -> dict:
    text = Path(directory, "README.md").read_text()
    return yaml.safe_load(text.split("---\n")[1])


def test_a_runs_card_names_it_with_license_text_and_training(small_run, capsys):
    export.main(["hf", f"--workdir={small_run}", "--out=plain"])
    config, card = load_run_config(small_run), Path("plain/README.md").read_text()
    assert "license" not in front("plain") and "Say it with --license=" in capsys.readouterr().out
    tokens = tokens_before(config, config.train.steps)
    assert f"# {config.name}\n" in card and f"| tokens trained on | {tokens:,} |" in card
    assert all(f"| {source.name} | " in card for source in config.data.sources) and "Not stated" in card
    export.main(["hf", f"--workdir={small_run}", "--out=own", "--license=MIT", "--name=Mine", "--dtype=float32"])
    assert front("own")["license"] == "mit" and "# Mine\n" in Path("own/README.md").read_text()
    assert "--license" not in capsys.readouterr().out


def test_a_branchs_card_has_the_training_and_text_of_the_runs_before_it(small_run):
    shutil.copytree(small_run, "branch")
    config = load_run_config(small_run)
    source = dataclasses.replace(config.data.sources[0], name="annealing text", license="CC-BY-4.0")
    data = dataclasses.replace(config.data, sources=(source,))
    branch = dataclasses.replace(config, name="annealed", data=data)
    save_run_config(branch, branch, "branch")

    def card(parent: str) -> str:
        write_origin("branch", "branch", 8, parent="as/it/was/called", parent_absolute=parent)
        export.main(["hf", "--workdir=branch", "--out=out", "--license=MIT"])
        text = Path("out/README.md").read_text()
        shutil.rmtree("out")
        return text

    first, last = tokens_before(config, 8), tokens_before(config, config.train.steps)
    whole, alone = card(str(small_run)), card("/nowhere")
    own = f"Trained for {config.train.steps - 8} steps on {last - first:,} tokens, as the run annealed."
    before = f"Trained for 8 steps on {first:,} tokens, as the run {config.name}."
    assert 0 < whole.index(before) < whole.index(own) and f"| tokens trained on | {last:,} |" in whole
    assert f"| {config.data.sources[0].name} | 100.0% of {first:,} tokens | CC0-1.0 |" in whole
    assert f"| annealing text | 100.0% of {last - first:,} tokens | CC-BY-4.0 |" in whole
    assert own in alone and "as/it/was/called at step 8): its text is not in this card." in alone


def test_a_card_tells_whose_weights_a_model_began_with(small, capsys):
    export.main(["hf", f"--model={small[1]}", "--out=hub", "--license=apache-2.0", "--name=Base"])
    text = Path("hub/README.md").read_text().replace("tags:\n", "language: [en, de]\nbase_model: org/older\ntags:\n")
    Path("hub/README.md").write_text(text)
    import_.main(["hf", "hub", "--out=run"])
    export.main(["hf", "--workdir=run", "--out=again"])
    assert front("again")["license"] == "apache-2.0" and front("again")["language"] == ["en", "de"]
    card = Path("again/README.md").read_text()
    assert "hub was made from org/older." in card and "The weights of hub were imported." in card
    assert "tokens trained on" not in card  # nothing was trained yet
    export.main(["hf", "--model=hub", "--out=copy"])
    assert front("copy")["license"] == "apache-2.0" and front("copy")["base_model"] == "org/older"


@pytest.mark.parametrize(
    "line, expected",
    [
        ("", ["your own text", "corpus/**/*.jsonl", "--data.sources.0.path="]),
        ("--data.sources.0.path=texts/*.txt", ["Train it on texts/*.txt: opendeep train --config="]),
        ("--config=llama3:1b", ["your own text", "corpus/**/*.jsonl"]),
        ("--config=quickstart", ["your own text: opendeep", "Without a path it trains on python_stdlib"]),
    ],
)
def test_what_an_import_says_to_train_on_is_named(line, expected, monkeypatch, capsys):
    config, said = RunConfig(), []

    def import_run(model, tokenizer, config, workdir, beside=None):
        said.append(config)
        Path(workdir).mkdir()

    monkeypatch.setattr("opendeep_jax.train.imported_run.import_run", import_run)
    monkeypatch.setattr("opendeep_jax.interop.config_from_hf", lambda _: config.model)
    monkeypatch.setattr("opendeep_jax.text.files.tokenizer_from_hf", lambda _: None)
    monkeypatch.setattr("opendeep_jax.interop.load_hf", lambda _: SimpleNamespace(config=config.model))
    Path("hub").mkdir()
    import_.main(["hf", "hub", "--out=my run", *shlex.split(line)])
    out = capsys.readouterr().out
    assert all(words in out for words in expected) and "--workdir='my run'" in out
    assert said[0].name == {"--config=llama3:1b": "llama3-1b", "--config=quickstart": "quickstart"}.get(line, "hub")


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("seed", 7, True),
        ("data.held_out_fraction", 0.2, True),
        ("train.steps", 500, True),
        ("optimizer.learning_rate", 1e-5, True),
        ("data.tokenizer", "bytes", False),
        ("optimizer.kind", "muon", False),
        ("optimizer.first_moment_dtype", "bfloat16", False),
        ("model.hidden_size", 1024, False),
    ],
)
def test_before_its_first_step_an_imported_run_takes_another_text_and_schedule_but_no_other_state(
    field, value, allowed, tmp_path
):
    config = RunConfig()
    save_run_config(config, config, tmp_path)
    (tmp_path / "recipe.py").touch()
    changed = apply(config, [f"--{field}={value}"])
    with contextlib.nullcontext() if allowed else pytest.raises(ConfigError, match=re.escape(field)):
        check_workdir(changed, tmp_path)


@pytest.mark.parametrize(
    "module, line, complaint",
    [
        (import_, "onnx x --out=a", "no such format"),
        (import_, "hf --out=a", "say what"),
        (import_, "gguf SMALL", "--out is missing"),
        (import_, "gguf nowhere.gguf --out=a", "cannot be read"),
        (import_, "hf ../nowhere --out=a", "is no directory"),
        (import_, "gguf SMALL --out=a --train.stepps=3", "Did you mean --train.steps"),
        (import_, "gguf SMALL --out=a --config=nonsense", "neither a recipe file nor the name"),
        (import_, "gguf SMALL --out=taken", "holds a run or a model already"),
        (export, "pt --workdir=a --out=b", "no such action"),
        (export, "hf --out=b", "--workdir of a run, or --model"),
        (export, "hf --workdir=a --model=b --out=c", "one of the two"),
        (export, "gguf --model=a", "--out is missing"),
        (export, "gguf --model=nowhere --out=b.gguf", "nowhere"),
        (export, "gguf --model=SMALL --out=b.gguf --type=q3", "must be one of f32, bf16, q8_0"),
        (export, "hf --model=SMALL --out=b --dtype=int8", "float32 or bfloat16"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_written(module, line, complaint, small):
    Path("taken").mkdir()
    Path("taken/config.json").write_text("{}")
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        module.main(shlex.split(line.replace("SMALL", str(small[1]))))
    assert [path.name for path in Path().iterdir()] == ["taken"]


def test_a_name_of_the_hub_that_cannot_be_fetched_is_explained(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_, **__):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(ConfigError, match=r"could not be fetched from the Hugging Face Hub \(no route to host\)"):
        import_.main(["hf", "someone/something", "--out=a"])


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def test_the_commands_and_programs_of_the_page_run(small, capsys):
    model, path = small
    Path("SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(path.read_bytes())
    export.main(["hf", f"--model={path}", "--out=models/llama", "--dtype=float32"])
    lines = [line.removeprefix("$ ") for block in blocks("bash") + blocks("console") for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("opendeep ")]
    modules = {"import": import_.main, "export": export.main}
    # train: test_an_imported_run_trains_on_with_what_was_said_at_the_import does that with a small corpus
    ran = [modules[name](rest) for _, name, *rest in commands if name in modules]
    assert len(ran) == 7 and {command[1] for command in commands} == {"import", "export", "train"}
    assert load_run_config("runs/tuned").optimizer.learning_rate == 1e-5
    assert same(model, load_hf("exported32"))
    assert read_gguf("smollm2.gguf").fields["general.file_type"] == 7
    capsys.readouterr()
    names: dict = {}
    for program in blocks("python"):
        exec(program, names)
    assert capsys.readouterr().out == "What is the capital of France?\n\n"


def test_an_imported_runs_text_and_license_go_along_to_both_exports_and_back(small):
    """Of a tokenizer without a begin token, whose end is no separator that a prompt may begin with."""
    model, _ = small
    Path("model").mkdir()
    tokenizer = byte_tokenizer()
    sampling = {"eos_token_id": [258, 256], "temperature": 0.6}
    plain = dataclasses.replace(
        tokenizer, begin_id=None, add_begin=False,
        special={"eos_token": "<｜end▁of▁sentence｜>", "pad_token": "<｜▁pad▁｜>"},
        end_ids=(258, 256), generation=sampling, chat_template=TEMPLATE,
    )  # fmt: skip
    save_hf(model, "model", tokenizer=save_tokenizer(plain, "text").parent)
    Path("model/LICENSE").write_text("Do as you like.\nBut well.\n")
    import_.main(["hf", "model", "--out=run", "--model.dtype=float32"])
    export.main(["hf", "--workdir=run", "--out=hub", "--dtype=float32"])
    export.main(["gguf", "--workdir=run", "--out=run.gguf", "--type=f32"])
    import_.main(["gguf", "run.gguf", "--out=again", "--model.dtype=float32"])
    for place in ("run", "hub", "run.gguf", "again"):
        found, _ = open_tokenizer(place)
        assert found.encode_prompt("Hi") == list(b"Hi") and found.begin_id is None, place
        assert (found.end_ids, found.generation, found.chat_template) == ((258, 256), sampling, TEMPLATE), place
        assert found.special == plain.special, place
    for place in ("run", "hub", "again"):
        assert Path(place, "LICENSE").read_text().strip() == "Do as you like.\nBut well.", place
    config = json.loads(Path("hub/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, [258, 256], 256)


def test_an_exported_run_of_ours_begins_texts_by_its_post_processor(small_run):
    export.main(["hf", f"--workdir={small_run}", "--out=hub", "--dtype=float32"])
    tokenizer, _ = open_tokenizer(small_run)
    library = tokenizers.Tokenizer.from_file("hub/tokenizer.json")
    assert (
        library.encode("größe").ids
        == tokenizer.encode_prompt("größe")
        == [tokenizer.begin_id, *tokenizer.encode("größe")]
    )
