"""Value limits of single fields, as annotations on the fields: `steps: Natural = 1000`. Standard library only."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, get_args, get_origin


class Limit(NamedTuple):
    """Rule that a field's value keeps whatever the other fields are, with the words that say so."""

    rule: str
    holds: Callable[[float], bool]


FROM_0 = Limit("must be at least 0", lambda value: value >= 0)
FROM_1 = Limit("must be at least 1", lambda value: value >= 1)
ABOVE_0 = Limit("must be greater than 0", lambda value: value > 0)

Natural = Annotated[int, FROM_0]
Count = Annotated[int, FROM_1]
Seed = Annotated[int, Limit("must be from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32)]
AxisSize = Annotated[
    int, Limit("must be at least 1, or -1 for what the devices leave", lambda value: value >= 1 or value == -1)
]
NonNegative = Annotated[float, FROM_0]
Positive = Annotated[float, ABOVE_0]
Stretch = Annotated[float, FROM_1]
Fraction = Annotated[float, Limit("must be from 0 to 1", lambda value: 0 <= value <= 1)]
FractionBelowOne = Annotated[float, Limit("must be from 0 to below 1", lambda value: 0 <= value < 1)]


def field_types(config: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields by name, without their limits."""
    types = {field.name: field.type for field in dataclasses.fields(config)}
    return {name: get_args(kind)[0] if get_origin(kind) is Annotated else kind for name, kind in types.items()}


def limits_of(config: Any) -> dict[str, Limit]:
    """Return the limits of a dataclass's fields by name; fields without one are left out."""
    fields = dataclasses.fields(config)
    return {field.name: get_args(field.type)[1] for field in fields if get_origin(field.type) is Annotated}
