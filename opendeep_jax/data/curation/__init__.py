"""Curation: sources in, the same sources without what a recipe drops out, and an account of every document."""

from opendeep_jax.data.curation.accounting import read_accounting
from opendeep_jax.data.curation.executors import parse_options
from opendeep_jax.data.curation.pipeline import check_curation, curate, curation_directory

__all__ = ["check_curation", "curate", "curation_directory", "parse_options", "read_accounting"]
