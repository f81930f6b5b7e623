"""Checker of annotated shapes and dtypes: `tests/conftest.py` has functions checked by it as tests trace them."""

import functools
import operator
import types
import typing
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray


def checked(function: Any) -> Any:
    """Decorate a function to raise where an array's shape or dtype is not what its annotation says.

    Which class an array is of does not matter (numpy's, jax's, an abstract one), nor do other annotations.
    """
    hints = {name: shape_of(hint) for name, hint in getattr(function, "__annotations__", {}).items()}
    function.__annotations__ = {name: hint for name, hint in hints.items() if hint is not Any}
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)


def shape_of(hint: Any) -> Any:
    """The annotation with arrays of any class and anything in place of what is no array."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return hint.dtype[Any, hint.dim_str]
    kind, parts = typing.get_origin(hint), [shape_of(part) for part in typing.get_args(hint)]
    if all(part is Any for part in parts):
        return Any
    if kind in (typing.Union, types.UnionType):
        parts = [None if part is type(None) else own for part, own in zip(typing.get_args(hint), parts, strict=True)]
        return functools.reduce(operator.or_, parts) if Any not in parts else Any
    return tuple[*parts] if kind is tuple and ... not in typing.get_args(hint) else Any
