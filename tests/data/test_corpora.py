"""The recipes of the open corpora read small shards in those corpora's schemas; only their paths are changed."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import small_shards

from opendeep_jax.config.load import recipe_directory
from opendeep_jax.config.schema import RunConfig, SourceConfig
from opendeep_jax.data.sources import Document, list_files, list_parts, read_part

RECIPES = sorted((recipe_directory() / "corpora").glob("*.py"))


def get_config(name: str) -> RunConfig:
    path = recipe_directory() / "corpora" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def brought_here(source: SourceConfig, root: Path) -> SourceConfig:
    """The source with the same files below `root` as on the hub; linked texts are in contents/."""
    inside = source.path.split("/", 5)[5]  # what follows hf://datasets/OWNER/NAME/
    changes = {"path": f"{root}/{inside}"}
    if source.text_url:
        changes["text_url"] = source.text_url.replace("s3://softwareheritage/content", f"file://{root}/contents")
    return dataclasses.replace(source, **changes)


def read(name: str, root: Path, left_out=None) -> list[Document]:
    counted = left_out if left_out is not None else []
    documents = []
    for source in (brought_here(source, root) for source in get_config(name).data.sources):
        for part in list_parts(source, list_files(source)):
            documents += read_part(source, part, lambda *reason: counted.append(reason))
    return documents


def test_there_are_recipes_of_the_open_corpora():
    corpora = {"fineweb_edu", "dclm_baseline", "dolma3_mix", "the_stack_v2", "open_web_math", "wikipedia"}
    assert corpora <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("name", [path.stem for path in RECIPES])
def test_recipe_reads_its_corpus_schema(name, tmp_path):
    expected = getattr(small_shards, f"write_{name}")(tmp_path)
    assert {document.id: document.text for document in read(name, tmp_path)} == expected


@pytest.mark.parametrize("name", [path.stem for path in RECIPES])
def test_recipe_says_license_and_citation_and_is_a_lab_note(name):
    for source in get_config(name).data.sources:
        assert source.license and "arXiv:" in source.citation + "arXiv:" * (name == "wikipedia")
        assert source.path.startswith("hf://datasets/") and source.name.startswith(name)
    note = (recipe_directory() / "corpora" / f"{name}.py").read_text()
    assert all(f"\n{word}:" in note for word in ("Size", "License", "Citation", "Where", "Command"))


def test_addresses_come_with_the_documents(tmp_path):
    for name in ("fineweb_edu", "dclm_baseline", "open_web_math", "wikipedia"):
        getattr(small_shards, f"write_{name}")(tmp_path / name)
        assert all(document.url.startswith("http") for document in read(name, tmp_path / name))


def test_dolma_keeps_the_licenses_of_code_and_the_addresses_of_pages(tmp_path):
    small_shards.write_dolma3_mix(tmp_path)
    page, code = read("dolma3_mix", tmp_path)
    assert (page.url, page.license) == ("http://example.org/dolma", "ODC-By-1.0")
    assert (code.url, code.license) == ("", "MIT")


def test_the_stack_is_permissive_and_counts_what_it_leaves_out(tmp_path):
    expected = small_shards.write_the_stack_v2(tmp_path)
    left_out = []
    documents = read("the_stack_v2", tmp_path, left_out)
    assert [document.license for document in documents] == ["MIT AND Apache-2.0", "MIT", "permissive"]
    assert [reason for reason, _ in left_out] == ["license_type is not permissive", "not ASCII"]
    assert not {id for _, id in left_out} & set(expected)
