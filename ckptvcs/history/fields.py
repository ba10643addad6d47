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


class Kind(NamedTuple):
    """A kind of field: how to load and dump its value.  A field with its `default` is omitted.

    `load` raises ValueError or CorruptionError if the JSON value is not of this kind.
    """

    load: Callable[[Json], Any]
    dump: Callable[[Any], Json] | None = None
    default: object = _OF_CLASS


def _of_type(kind: type) -> Kind:
    def load(value: Json) -> Json:
        if type(value) is not kind:
            raise ValueError
        return value

    return Kind(load)


def _load_natural(value: Json) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError
    return value


def _load_signed(value: Json) -> int:
    if type(value) is not int or abs(value) >= 1 << 63:
        raise ValueError
    return value


def to_number(value: Json) -> float:
    """Undo `from_number`.  Raises CorruptionError."""
    if isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63):
        return value
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    kind = type(value).__name__  # the value may be too large to show
    raise CorruptionError(f"a record has a {kind} instead of a number")


TEXT, FLAG, OBJECT = _of_type(str), _of_type(bool), _of_type(dict)
NATURAL, SIGNED = Kind(_load_natural), Kind(_load_signed)
NUMBER, ID = Kind(to_number, from_number), Kind(checked_id)


def optional(kind: Kind) -> Kind:
    """Return the kind of a field that is omitted if it is None."""
    return kind._replace(default=None)


def nullable(kind: Kind) -> Kind:
    """Return the kind of a field that is null if it is None."""
    return Kind(lambda value: None if value is None else kind.load(value), kind.dump, _REQUIRED)


def many(kind: Kind) -> Kind:
    """Return the kind of a list, which is loaded as a tuple."""

    def load(values: Json) -> tuple[Any, ...]:
        if type(values) is not list:
            raise ValueError
        return tuple(map(kind.load, values))

    dump = kind.dump
    return Kind(load, dump and (lambda items: list(map(dump, items))))


def mapping(kind: Kind) -> Kind:
    """Return the kind of an object with any keys, and values of this kind."""
    dump = kind.dump or (lambda value: value)
    return Kind(
        lambda values: {key: kind.load(value) for key, value in OBJECT.load(values).items()},
        lambda items: {key: dump(value) for key, value in items.items()},
    )


_KINDS = {
    "str": TEXT,
    "bool": FLAG,
    "int": NATURAL,
    "float": NUMBER,
    "ObjectId": ID,
    "Mapping[str, float]": mapping(NUMBER),
}
_KINDS |= {f"tuple[{name}, ...]": many(kind) for name, kind in _KINDS.items()}
_KINDS |= {f"{name} | None": optional(kind) for name, kind in _KINDS.items()}


class Fields(Generic[T]):
    """The fields of a record.

    If `make` is a dataclass, its annotations are the kinds (an `int` is not negative) and its
    defaults are those of the fields.  Otherwise it builds the record from the values of `kinds`.
    """

    def __init__(self, make: Callable[..., T], **kinds: Kind) -> None:
        """`kinds` are the kinds of the fields that their annotations do not tell."""
        names: Mapping[str, Any] = make.__annotations__ if isinstance(make, type) else kinds
        self._make, self._fields = make, list[tuple[str, Any, Any, object]]()
        for name in names:
            load, dump, default = kinds.get(name) or _KINDS[names[name]]
            if default is _OF_CLASS:  # a dataclass has its defaults as attributes
                default = getattr(make, name, _REQUIRED)
            self._fields.append((name, load, dump, default))
        self.kind = Kind(self._load, self.as_json)

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
