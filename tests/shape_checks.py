"""The type checker of shape annotations in tests: `tests/conftest.py` has it check every annotated function."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""A decorator that raises where an argument or a result is not what its annotation says; an int may be a float."""
