"""The fields of a JSON record, described once for loading and dumping.

Loading checks every field, because a repository may come from someone else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from ckptvcs.errors import CorruptionError
from ckptvcs.history.canonical_json import Json, dump, load
from ckptvcs.store.ids import checked_id
from ckptvcs.text import from_number

T = TypeVar("T")

_REQUIRED, _OF_CLASS = object(), object()


class FieldType(NamedTuple):
    """A type of field: how to load and dump its value.  A field with its `default` is omitted.

    `load` raises ValueError or CorruptionError if the JSON value is not of this type.
    """

    load: Callable[[Json], Any]
    dump: Callable[[Any], Json] | None = None
    default: object = _OF_CLASS


def _of_class(cls: type) -> FieldType:
    def load(value: Json) -> Json:
        if type(value) is not cls:
            raise ValueError
        return value

    return FieldType(load)


def _integer(least: int) -> FieldType:
    def load(value: Json) -> int:
        if type(value) is not int or not least <= value < 1 << 63:
            raise ValueError
        return value

    return FieldType(load)


def to_number(value: Json) -> float:
    """Undo `from_number`.  Raises CorruptionError."""
    if isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63):
        return value
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    cls = type(value).__name__  # the value may be too large to show
    raise CorruptionError(f"a record has a {cls} instead of a number")


TEXT, FLAG, OBJECT = _of_class(str), _of_class(bool), _of_class(dict)
NATURAL, SIGNED = _integer(0), _integer(1 - (1 << 63))
NUMBER, ID = FieldType(to_number, from_number), FieldType(checked_id)


def optional(item: FieldType) -> FieldType:
    """Return the type of a field that is omitted if it is None."""
    return item._replace(default=None)


def nullable(item: FieldType) -> FieldType:
    """Return the type of a field that is null if it is None."""
    dump = item.dump
    return FieldType(
        lambda value: None if value is None else item.load(value),
        dump and (lambda value: None if value is None else dump(value)),
        _REQUIRED,
    )


def many(item: FieldType) -> FieldType:
    """Return the type of a list, which is loaded as a tuple."""

    def load(values: Json) -> tuple[Any, ...]:
        if type(values) is not list:
            raise ValueError
        return tuple(map(item.load, values))

    dump = item.dump
    return FieldType(load, dump and (lambda items: list(map(dump, items))))


def mapping(item: FieldType) -> FieldType:
    """Return the type of an object with any keys, and values of this type."""
    dump = item.dump or (lambda value: value)
    return FieldType(
        lambda values: {key: item.load(value) for key, value in OBJECT.load(values).items()},
        lambda items: {key: dump(value) for key, value in items.items()},
    )


_TYPES = {
    "str": TEXT,
    "bool": FLAG,
    "int": NATURAL,
    "float": NUMBER,
    "ObjectId": ID,
    "Mapping[str, float]": mapping(NUMBER),
}
_TYPES |= {f"tuple[{name}, ...]": many(kind) for name, kind in _TYPES.items()}
_TYPES |= {f"{name} | None": optional(kind) for name, kind in _TYPES.items()}


class Fields(Generic[T]):
    """The fields of a record.

    If `make` is a dataclass, its annotations are the types (an `int` is not negative) and its
    defaults are those of the fields.  Otherwise it builds the record from the values of `types`.
    """

    def __init__(self, make: Callable[..., T], **types: FieldType) -> None:
        """`types` are the types of the fields that their annotations do not tell."""
        names: Mapping[str, Any] = make.__annotations__ if isinstance(make, type) else types
        self._make, self._fields = make, list[tuple[str, Any, Any, object]]()
        for name in names:
            load, dump, default = types.get(name) or _TYPES[names[name]]
            if default is _OF_CLASS:  # a dataclass has its defaults as attributes
                default = getattr(make, name, _REQUIRED)
            self._fields.append((name, load, dump, default))
        self.type = FieldType(self._load, self.as_json)

    def as_json(self, record: T) -> dict[str, Json]:
        """Return a record as JSON."""
        fields = {}
        for name, _, dump_value, default in self._fields:
            value = getattr(record, name)
            if value != default:
                fields[name] = dump_value(value) if dump_value else value
        return fields

    def dump(self, record: T) -> bytes:
        """Return the canonical bytes of a record."""
        return dump(self.as_json(record))

    def _load(self, fields: Json) -> T:
        OBJECT.load(fields)
        values = []
        for name, load_value, _, default in self._fields:
            value = fields.get(name)
            if value is None and default is not _REQUIRED:
                values.append(default)
                continue
            try:
                values.append(load_value(value))
            except ValueError as error:
                raise ValueError(f"{name}.{error}".rstrip(".")) from None
        return self._make(*values)

    def load(self, data: bytes, what: str) -> T:
        """Load a record.  Raises CorruptionError, naming `what`."""
        return self.of_json(load(data, what), what)

    def of_json(self, fields: dict[str, Json], what: str) -> T:
        """Return a record from JSON.  Raises CorruptionError, naming `what`."""
        try:
            return self._load(fields)
        except ValueError as error:
            raise CorruptionError(f"{what} has no valid '{error}'") from error
