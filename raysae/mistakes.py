"""What is wrong with a value, at the field where it was written, as one line for the user."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from raysae.errors import FieldError, nearest
from raysae.worlds.spec import KINDS

Loc = tuple[str, ...]
"""Path of a field from the top of the file."""


def located(error: ValueError, *loc: str) -> ValidationError:
    """What is wrong with a value made from the section at `loc`, as mistakes of its fields."""
    return moved(error, lambda inner: (*loc, *inner))


def moved(error: ValueError, where: Callable[[Loc], Loc]) -> ValidationError:
    """The same mistakes, each at `where` of its place."""
    found: list[tuple[Loc, str]]
    if isinstance(error, ValidationError):
        found = [(_loc(item), _problem(item, (), None)) for item in error.errors()]
    else:
        found = [((error.field,) if isinstance(error, FieldError) else (), str(error))]
    details: list[InitErrorDetails] = []
    for loc, message in found:
        custom = PydanticCustomError("value_error", "{message}", {"message": message})
        details.append(InitErrorDetails(type=custom, loc=where(loc), input=None))
    return ValidationError.from_exception_data("", details)


@contextmanager
def mistakes_at(*loc: str) -> Iterator[None]:
    """What cannot be made inside is a mistake at `loc`."""
    try:
        yield
    except ValueError as error:
        raise located(error, *loc) from None


def fields_of(value: Any, loc: Loc) -> Iterator[Loc]:
    """The field at `loc` and those inside of its value."""
    yield loc
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from fields_of(inner, (*loc, str(key)))


def explain(
    path: Path,
    error: ValidationError,
    lines: dict[Loc, int],
    overridden: set[Loc],
    root: type[BaseModel],
    prefix: Loc = (),
) -> str:
    """A line a mistake, with file, line and field, or the command line where it was set there.

    Args:
        path: of the file.
        error: of `root`, the model of a whole file, or of its part at `prefix`.
        lines: of the file's fields.
        overridden: fields that were set on the command line.
    """
    messages = []
    for item in error.errors():
        full = (*prefix, *_loc(item))
        loc = _as_written(full)
        line = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), None)
        known = loc
        while known and known not in lines.keys() | overridden and item["type"] != "missing":
            known = known[:-1]
        dotted = ".".join(known or loc)
        where = f"{path}:{line}" if line else str(path)
        if any(loc[:n] in overridden for n in range(1, len(loc) + 1)):
            where = f"{path}, set on the command line"
        messages.append(f"{where}: {dotted + ': ' if dotted else ''}{_problem(item, full, root)}")
    return "\n".join(dict.fromkeys(messages))


def _loc(item: Any) -> Loc:
    """Where a mistake is, down to the field that a check of several fields blames."""
    loc = tuple(str(part) for part in item["loc"])
    cause = item.get("ctx", {}).get("error")
    return (*loc, cause.field) if isinstance(cause, FieldError) else loc


def _as_written(loc: Loc) -> Loc:
    """Without the kind of world that pydantic puts after `world`."""
    return (loc[0], *loc[2:]) if loc[:1] == ("world",) and len(loc) > 1 else loc


def _problem(item: Any, loc: Loc, root: type[BaseModel] | None) -> str:
    value = item.get("input")
    if item["type"] == "extra_forbidden" and root is not None:
        return f"unknown key {loc[-1]!r}; {nearest(loc[-1], _fields_at(root, loc[:-1]))}"
    if item["type"] == "missing":
        return "is missing"
    message: str = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return message
    return f"{message}, got {value!r}"


def _fields_at(root: type[BaseModel], loc: Loc) -> list[str]:
    """Names of the fields of the config section at `loc`."""
    annotation: Any = root
    if loc[:1] == ("world",):
        annotation, loc = KINDS[loc[1]], loc[2:]
    for part in loc:
        entries = [get_args(o)[1] for o in _options(annotation) if get_origin(o) is dict]
        field = _model_fields(annotation).get(part)
        if field is None and not entries:
            return []
        annotation = entries[0] if field is None else field.annotation
    return [f.alias or name for name, f in _model_fields(annotation).items()]


def _options(annotation: Any) -> list[Any]:
    """A type, and those of a union."""
    return [annotation, *get_args(annotation)]


def _model_fields(annotation: Any) -> dict[str, Any]:
    models = [o for o in _options(annotation) if isinstance(o, type) and issubclass(o, BaseModel)]
    return dict(models[0].model_fields) if models else {}
