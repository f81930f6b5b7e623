"""The checker of annotated shapes and dtypes in tests: `tests/conftest.py` has it check functions that are traced."""

from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray


def checked(function: Any) -> Any:
    """Decorate a function to raise where an array is not what its annotation says; other annotations are left alone."""
    hints = getattr(function, "__annotations__", {})
    function.__annotations__ = {name: hint for name, hint in hints.items() if has_shape(hint)}
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)


def has_shape(hint: Any) -> bool:
    """Tell whether an annotation is of an array with a shape, or of a union or tuple with one."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(has_shape(part) for part in get_args(hint))
