"""A card's front matter is YAML that says what was meant, and is read back."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from opendeep_jax.interop.hf_card import Provenance
from opendeep_jax.interop.hf_front import front_matter, license_fields, read_front_matter

TRICKY = [
    "no",
    "on",
    "1.0",
    "a: b",
    "- a",
    "#x",
    "null",
    "",
    "a #b",
    "'",
    '"',
    "{a}",
    "[a]",
    "en",
    "é",
    "a/b",
    "*a",
    "y",
]
PRINTABLE = st.text(min_size=1, max_size=12).filter(str.isprintable)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(TRICKY) | PRINTABLE, max_size=4),
    st.sampled_from(TRICKY) | PRINTABLE,
)
def test_any_text_arrives_in_yaml_as_it_was(texts, license):
    front = front_matter({"license": license, "language": texts, "tags": ["opendeep"]})
    assert front.startswith("---\n") and front.endswith("---\n")
    expected = {"license": license, "language": texts, "tags": ["opendeep"]}
    assert yaml.safe_load(front[4:-4]) == {name: value for name, value in expected.items() if value}
    assert yaml.safe_load(front_matter({"license": "a\n---\x7fb"})[4:-4]) == {"license": "a --- b"}


@pytest.mark.parametrize(
    "license, fields",
    [
        ("", {}),
        ("apache-2.0", {"license": "apache-2.0"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("MIT", {"license": "mit"}),
        ("llama3.2", {"license": "llama3.2"}),
        ("PSF-2.0", {"license": "other", "license_name": "psf-2.0"}),
        ("My own terms", {"license": "other", "license_name": "my-own-terms"}),
    ],
)
def test_a_license_is_one_of_the_hubs_or_has_a_name_of_its_own(license, fields):
    assert license_fields(license) == fields


@pytest.mark.parametrize(
    "card, expected",
    [
        ("---\nlicense: mit\nlanguage:\n- en\n- 'no'\n---\ntext", {"license": "mit", "language": ["en", "no"]}),
        ('---\nlanguage: [en, "de"]\nlicense: "mit" \n---\n', {"language": ["en", "de"], "license": "mit"}),
        ("---\nbase_model: a/b # the base\n---\n", {"base_model": "a/b"}),
        ("---\nlicense: mit\n", {}),
        ("# no front matter\nlicense: mit\n---\n", {}),
        ("", {}),
    ],
)
def test_front_matter_is_read(card, expected, tmp_path):
    (tmp_path / "README.md").write_text(card)
    assert read_front_matter(tmp_path / "README.md") == expected
    assert read_front_matter(tmp_path / "missing.md") == {}


def test_only_names_of_the_hub_are_given_to_the_hub():
    sources = ({"name": "a", "license": "x", "dataset": "org/set"}, {"name": "b", "license": "y", "dataset": ""})
    provenance = Provenance("mine", "mit", "org/model", sources=sources, languages=("en", "no"))
    front = yaml.safe_load(provenance.front()[4:-4])
    assert front == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "license": "mit", "base_model": "org/model",
        "datasets": ["org/set"], "language": ["en", "no"], "tags": ["opendeep"],
    }  # fmt: skip
    local = yaml.safe_load(Provenance("mine", base_model="my model").front()[4:-4])
    assert not {"base_model", "license", "datasets", "language"} & set(local)
    assert "my model" in Provenance("mine", base_model="my model").sections()
