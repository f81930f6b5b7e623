"""Sources in, the same sources without what a recipe drops out, and an account of every document.

    sources = curate(config)                        # config.curation says what is done
    config = dataclasses.replace(config, sources=tuple(sources))

The order is: quality filters and language, exact duplicates, near-duplicates, evaluation overlap, personal data.
Copies are looked for over all sources; the first in order of source and file stays. The result is a function of the
documents and the recipe alone, byte by byte, whoever computed it and however often that was broken off.
"""

import dataclasses
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.schema import CurationConfig, DataConfig, SourceConfig
from opendeep_jax.config.storage import alone_in, file_name, sha256_of
from opendeep_jax.data.curation.accounting import VERSION, load_accounting
from opendeep_jax.data.curation.evaluation import SUFFIXES, set_names, write_index
from opendeep_jax.data.curation.executors import Executor, check_executor, run_stages
from opendeep_jax.data.curation.plan import CurationPlan, cut_tasks, read_plan, recipe_of, write_plan
from opendeep_jax.data.curation.stages import refuse_nothing_left
from opendeep_jax.data.sources import LATER_FIELDS, fingerprint, list_files, list_parts

RESERVED = ("work", "dropped", "logs", "curation.json")
"""Names in the directory of a curation that no source may have."""
LANGUAGE_MODELS = (
    "fastText's own, lid.176.bin, for 176 languages, is at https://fasttext.cc/docs/en/language-identification.html "
    "(126 MB); GlotLID, for 2,000, is model.bin of cis-lmu/glotlid on the Hugging Face Hub"
)


def curate(
    config: DataConfig,
    executor: Executor = "local",
    progress: bool = True,
    options: Mapping[str, Any] | None = None,
) -> list[SourceConfig]:
    """Return the sources as config.curation leaves them, each a directory of Parquet files below config.directory.

    They are the sources themselves where config.curation asks for nothing. What was curated before, by any executor, is
    returned at once, and what was begun and broken off is gone on with.

    Args:
        config: of it sources, curation, directory and workers count.
        executor: `local` works with config.workers processes of this machine; `slurm` and `ray` with datatrove's
            executors of these names, and then config.directory must be on a disk that all machines share.
        progress: show bars on the error stream.
        options: arguments of datatrove's executor, such as `{"partition": "cpu", "time": "8:00:00"}` for Slurm.

    Raises:
        ConfigError: for sources that cannot be read, packages, models and evaluation sets that are not there, an
            executor that fails, and a source of which nothing is left.
    """
    if not config.curation.active:
        return list(config.sources)
    directory = curation_directory(config)
    if not load_accounting(directory):
        check_curation(config)
        check_executor(executor, options or {})
        with alone_in(directory, "curating in"):
            if not load_accounting(directory):  # Another process may have done it while this one waited.
                plan = _plan(config, directory)
                run_stages(plan, executor, options or {}, config.workers, progress)
    shutil.rmtree(directory / "work", ignore_errors=True)
    accounting = load_accounting(directory)
    refuse_nothing_left(accounting)
    return [_curated(source, directory) for source in config.sources]


def curation_directory(config: DataConfig) -> Path:
    """Return the directory of this curation, named by a hash of all that decides its result. Raises ConfigError.

    That is the sources' files and fields, the recipe, and the contents of the language model and evaluation sets; not
    the versions of the engines, which curation.json tells, so that nothing is done again for an upgrade.
    """
    recipe = config.curation
    sources = [(source.name, fingerprint(source, list_files(source))) for source in config.sources]
    files = [_file_hash(Path(path).expanduser()) for path in _files_of(recipe)]
    content = [VERSION, sources, recipe_of(recipe), files]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return Path(config.directory) / "curated" / key[:16]


def _files_of(recipe: CurationConfig) -> list[str]:
    return [*filter(None, [recipe.language_model]), *recipe.evaluation_sets]


def _file_hash(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        if path.suffix in SUFFIXES:
            raise ConfigError(
                f"Cannot read the evaluation set {path}: {error.strerror}. data.curation.evaluation_sets names files."
            ) from error
        raise ConfigError(
            f"Cannot read the language model {path}: {error.strerror}. data.curation.language_model is the path of a "
            f"fastText model: {LANGUAGE_MODELS}."
        ) from error


def check_curation(config: DataConfig) -> None:
    """Raise ConfigError, quickly, for what `curate` would stop at: packages, files, and settings that need them."""
    recipe = config.curation
    needed = {"datatrove", "xxhash", "regex", "pyarrow"}
    needed |= {"rensa"} if recipe.minhash_deduplication else set()
    needed |= {"fasttext", "fasteners"} if recipe.language_model else set()
    missing = sorted(name for name in needed if importlib.util.find_spec(name) is None)
    if missing:
        raise ConfigError(
            f"Curation needs {', '.join(missing)}, which is not installed: pip install 'opendeep-jax[curation]'."
        )
    foreign = [language for language in recipe.languages if language.partition("_")[0] not in ("en", "eng")]
    if foreign and recipe.quality:
        raise ConfigError(
            f"data.curation.languages keeps {', '.join(foreign)}, and data.curation.quality is "
            f"{', '.join(recipe.quality)}, whose thresholds are those of papers on English text: they would drop most "
            "of other languages. Curate these languages in a recipe of their own without quality, or keep en alone."
        )
    for path in recipe.evaluation_sets:
        if Path(path).suffix not in SUFFIXES:
            raise ConfigError(
                f"data.curation.evaluation_sets has {path}, but a set of evaluation items is a file that ends in "
                f"{', '.join(SUFFIXES)}."
            )
    set_names(recipe)
    for path in _files_of(recipe):
        if not Path(path).expanduser().is_file():
            _file_hash(Path(path).expanduser())
    names = [file_name(source.name) for source in config.sources]
    for name in names:
        if names.count(name) > 1 or name in RESERVED:
            raise ConfigError(
                f"A source of data.sources is named {name!r}, as {'another' if name not in RESERVED else 'a file'} in "
                "the directory of curated text is. Give each source a name of its own."
            )


def _plan(config: DataConfig, directory: Path) -> CurationPlan:
    """Return the plan of an earlier attempt, or a new one."""
    try:
        plan = dataclasses.replace(read_plan(directory), sources=config.sources)
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(directory / "work", ignore_errors=True)
        parts = [list_parts(source, list_files(source)) for source in config.sources]
        recipe = config.curation
        evaluation = write_index(recipe, directory / "work" / "evaluation") if recipe.evaluation_sets else {}
        plan = CurationPlan(directory, recipe, config.sources, cut_tasks(parts), evaluation)
    write_plan(plan)
    return plan


def _curated(source: SourceConfig, directory: Path) -> SourceConfig:
    return dataclasses.replace(
        source,
        path=str(directory / file_name(source.name)),
        text_field="text",
        id_field="id",
        url_field="url",
        license_field="license",
        text_url="",
        keep=(),
        bad_documents="refuse",
        **LATER_FIELDS,
    )
