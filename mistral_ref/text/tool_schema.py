"""Check that the parameters of a tool are a JSON schema, by the rules of draft 7, which Mistral's library follows.

Only the schema is checked, never a value against it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from mistral_ref.errors import InputError, short_repr

_TYPES = {"array", "boolean", "integer", "null", "number", "object", "string"}
_KINDS = {
    "string": "$id $schema $ref $comment title description pattern format contentMediaType contentEncoding",
    "boolean": "readOnly uniqueItems",
    "number": "multipleOf maximum exclusiveMaximum minimum exclusiveMinimum",
    "count": "maxLength minLength maxItems minItems maxProperties minProperties",
    "list": "examples enum",
    "names": "required",
    "type": "type",
    "schema": "additionalItems contains additionalProperties propertyNames if then else not",
    "schemas": "allOf anyOf oneOf",
    "schema or schemas": "items",
    "map of schemas": "definitions properties patternProperties",
    "map of schemas or names": "dependencies",
}
_KIND = {keyword: kind for kind, keywords in _KINDS.items() for keyword in keywords.split()}
_MAX_DEPTH = 64


def check_schema(schema: Any, where: str, depth: int = 0) -> None:
    """Raise InputError unless a value is a JSON schema: True, False, or a dict whose keywords have the right values.

    Keywords that draft 7 does not know may have any value. The message begins with `where`.
    """
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise InputError(f"{where} is {short_repr(schema)}; expected a JSON schema: a dict, True or False")
    if depth > _MAX_DEPTH:
        raise InputError(f"{where}: schemas are nested more than {_MAX_DEPTH} deep, the maximum")
    for keyword, value in schema.items():
        _check(_KIND.get(keyword, "any"), value, f"{where}.{keyword}", depth + 1)
    if not isinstance(multiple := schema.get("multipleOf", 1), bool) and multiple <= 0:
        raise InputError(f"{where}.multipleOf is {short_repr(multiple)}; expected a number above 0")
    for pattern in [schema.get("pattern", ""), *schema.get("patternProperties", {})]:
        try:
            re.compile(pattern)
        except (re.error, TypeError, RecursionError):
            raise InputError(f"{where}: the pattern {short_repr(pattern)} is no regular expression") from None


def _check(kind: str, value: Any, where: str, depth: int) -> None:
    """Raise InputError unless the value of a keyword is of this kind."""
    if kind == "schema":
        check_schema(value, where, depth)
    elif kind == "schema or schemas":
        _check("schemas" if isinstance(value, list) else "schema", value, where, depth)
    elif kind == "schemas":
        _expect(isinstance(value, list) and bool(value), value, where, "a list of at least one schema")
        for n, schema in enumerate(value):
            check_schema(schema, f"{where}[{n}]", depth)
    elif kind.startswith("map of schemas"):
        _expect(isinstance(value, dict), value, where, "a dict")
        for name, schema in value.items():
            is_names = kind.endswith("names") and isinstance(schema, list)
            _check("names" if is_names else "schema", schema, f"{where}.{name}", depth)
    elif kind != "any":
        is_right, expected = _PLAIN[kind]
        _expect(is_right(value), value, where, expected)


def _expect(is_right: bool, value: Any, where: str, expected: str) -> None:
    if not is_right:
        raise InputError(f"{where} is {short_repr(value)}; expected {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value) and len(set(value)) == len(value)


def _is_type(value: Any) -> bool:
    return value in _TYPES if isinstance(value, str) else bool(value) and _are_names(value) and set(value) <= _TYPES


_PLAIN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "string": (lambda value: isinstance(value, str), "a string"),
    "boolean": (lambda value: isinstance(value, bool), "true or false"),
    "number": (_is_number, "a number"),
    "count": (_is_count, "a whole number of at least 0"),
    "list": (lambda value: isinstance(value, list), "a list"),
    "names": (_are_names, "a list of different strings"),
    "type": (_is_type, f"one or several of {', '.join(sorted(_TYPES))}"),
}
