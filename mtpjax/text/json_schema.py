"""JSON schemas as outlines-core turns them into regular expressions without loss.

The library passes over keywords that it does not know, and over some combinations of those that it knows. Here a
schema is rewritten into the part that it gets right, and whatever is left is refused by name: a text that follows the
automaton then satisfies the schema.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

ANNOTATIONS = {
    *("$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples"),
    *("deprecated", "readOnly", "writeOnly", "discriminator", "contentMediaType"),
}
KEYWORDS: dict[str, set[str]] = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": set(),
    "integer": set(),
    "boolean": set(),
    "null": set(),
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}
_COMBINED = ("enum", "const", "anyOf", "oneOf", "allOf", "$ref")
_DATE = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"  # days that every month has
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_OCTET = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": rf"{_OCTET}(\.{_OCTET}){{3}}",
    "email": r"[A-Za-z0-9_]+([.+-][A-Za-z0-9_]+)*@[A-Za-z0-9]+(-[A-Za-z0-9]+)*(\.[A-Za-z0-9]+(-[A-Za-z0-9]+)*)+",
}
MAX_NODES = 5_000  # of a schema whose references are written out
_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda v: isinstance(v, str),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "integer": lambda v: not isinstance(v, bool) and (isinstance(v, int) or (isinstance(v, float) and v.is_integer())),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}
_ANY = {"anyOf": [{"type": name} for name in ("string", "number", "boolean", "null", "object", "array")]}


def simplify_schema(schema: Any, check_pattern: Callable[[str], None]) -> dict[str, Any]:
    """Return a schema that the library turns into an expression whose texts satisfy `schema`.

    References are written out. Objects have the properties in the order of the schema and no others; `oneOf` is
    supported where the types of its alternatives differ.

    Args:
        schema: parsed JSON.
        check_pattern: raises ValueError for a `pattern` that does not parse or would end the string that it stands in.

    Raises:
        ValueError: nothing satisfies the schema, or it has a keyword or a combination that is not supported; names it
            and its place.
    """
    return _Simplifier(schema, check_pattern).simplify(schema, "the schema", ())


class _Simplifier:
    def __init__(self, root: Any, check_pattern: Callable[[str], None]):
        self.root, self.check_pattern, self.num_nodes = root, check_pattern, 0

    def simplify(self, schema: Any, place: str, refs: tuple[str, ...]) -> dict[str, Any]:
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise ValueError(f"the schema has more than {MAX_NODES} parts when its references are written out")
        if schema is True:
            return _ANY
        if schema is False:
            raise ValueError(f"{place} is false: nothing satisfies it")
        if not isinstance(schema, Mapping):
            raise ValueError(f"{place} is {schema!r}; expected an object, true or false")
        keys = {key for key in schema if key not in ANNOTATIONS}
        combined = [key for key in _COMBINED if key in keys]
        if combined:
            key = combined[0]
            _refuse(keys - {key, *(["type"] if key in ("enum", "const") else [])}, place, f"beside {key!r}")
            return self._combined(key, schema, place, refs)
        types = schema.get("type")
        if types is None:
            types = [name for name, words in KEYWORDS.items() if words & keys]
            if keys and len(types) != 1:
                _refuse(keys, place, "without 'type'")
            if not keys:
                return _ANY
        names = types if isinstance(types, list) else [types]
        for name in names:
            if name not in KEYWORDS:
                raise ValueError(f"{place} has the type {name!r}; expected one of {', '.join(KEYWORDS)}")
        if not names:
            raise ValueError(f"{place} has no type: nothing satisfies it")
        _refuse(keys - {"type"}.union(*(KEYWORDS[name] for name in names)), place)
        parts = [self._typed(name, schema, place, refs) for name in names]
        return parts[0] if len(parts) == 1 else {"anyOf": parts}

    def _combined(self, key: str, schema: Mapping[str, Any], place: str, refs: tuple[str, ...]) -> dict[str, Any]:
        value = schema[key]
        if key == "$ref":
            if value in refs:
                raise ValueError(f"{place}: {value!r} refers to itself; a finite automaton has no recursion")
            return self.simplify(self._resolve(value, place), f"{value}", (*refs, value))
        if key in ("enum", "const"):
            values = value if key == "enum" else [value]
            if not isinstance(values, list):
                raise ValueError(f"{place} has an 'enum' that is not a list")
            if types := schema.get("type"):
                names = types if isinstance(types, list) else [types]
                values = [v for v in values if any(_TYPES.get(name, lambda _: False)(v) for name in names)]
            if not values:
                raise ValueError(f"{place}: no value of {key!r} satisfies it")
            for v in values:
                _check_names(v, place)
            return {"enum": values}
        if not isinstance(value, list) or not value:
            raise ValueError(f"{place} has {key!r} that is not a list of schemas")
        if key == "allOf" and len(value) > 1:
            raise ValueError(f"{place} has 'allOf' of {len(value)} schemas, which is not supported; write them as one")
        parts = [self.simplify(part, f"{place}.{key}[{i}]", refs) for i, part in enumerate(value)]
        if key == "oneOf" and len(parts) > 1:
            _check_disjoint(parts, place)
        return parts[0] if len(parts) == 1 else {"anyOf": parts}

    def _typed(self, name: str, schema: Mapping[str, Any], place: str, refs: tuple[str, ...]) -> dict[str, Any]:
        has = {key: schema[key] for key in schema if key in KEYWORDS[name]}
        for key in ("minLength", "maxLength", "minItems", "maxItems"):
            if key in has and not (type(has[key]) is int and has[key] >= 0):
                raise ValueError(f"{place} has {key!r} = {has[key]!r}; expected a whole number >= 0")
        for low, high in (("minLength", "maxLength"), ("minItems", "maxItems")):
            if has.get(low, 0) > has.get(high, has.get(low, 0)):
                raise ValueError(f"{place}: {low} {has[low]} is above {high} {has[high]}; nothing satisfies it")
        if name == "string":
            return self._string(has, place)
        if name == "array":
            return self._array(has, place, refs)
        if name == "object":
            return self._object(has, place, refs)
        return {"type": name}

    def _string(self, has: dict[str, Any], place: str) -> dict[str, Any]:
        if "pattern" in has or "format" in has:
            key = "pattern" if "pattern" in has else "format"
            _refuse(set(has) - {key}, place, f"beside {key!r}")
            if key == "format" and has[key] not in FORMATS:
                raise ValueError(f"{place} has the format {has[key]!r}; supported: {', '.join(FORMATS)}")
            pattern = has[key] if key == "pattern" else FORMATS[has[key]]
            if not isinstance(pattern, str):
                raise ValueError(f"{place} has a pattern that is not a string")
            try:
                self.check_pattern(pattern)
            except ValueError as error:
                raise ValueError(f"{place}: the pattern {pattern!r}: {error}") from None
            inner = pattern.removeprefix("^")
            if inner.endswith("$") and not inner.endswith("\\$"):
                inner = inner[:-1]
            return {"type": "string", "pattern": inner}
        return {"type": "string", **has}

    def _array(self, has: dict[str, Any], place: str, refs: tuple[str, ...]) -> dict[str, Any]:
        if "prefixItems" in has:
            items = has.pop("prefixItems")
            if has.pop("items", None) not in (None, False, True) or not isinstance(items, list) or not items:
                raise ValueError(f"{place}: 'prefixItems' with other 'items' is not supported")
            if has.get("minItems", 0) > len(items) or has.get("maxItems", len(items)) < len(items):
                raise ValueError(f"{place}: 'prefixItems' with another number of items is not supported")
            return {"prefixItems": [self.simplify(x, f"{place}.prefixItems[{i}]", refs) for i, x in enumerate(items)]}
        if "items" in has and has["items"] is not True:
            has["items"] = self.simplify(has["items"], f"{place}.items", refs)
        else:
            has.pop("items", None)
        if has.get("maxItems") == 0:
            has.pop("items", None)
        return {"type": "array", **has}

    def _object(self, has: dict[str, Any], place: str, refs: tuple[str, ...]) -> dict[str, Any]:
        properties, required = has.get("properties", {}), has.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise ValueError(f"{place}: 'properties' must be an object and 'required' a list")
        for name in required:
            if name not in properties:
                raise ValueError(f"{place} requires {name!r}, which 'properties' does not describe")
        _check_names(dict.fromkeys(properties), place)
        if properties:
            parts = {
                name: self.simplify(part, f"{place}.properties[{name!r}]", refs)
                for name, part in properties.items()
                if part is not False or name in required
            }
            return {"type": "object", "properties": parts, "required": required}
        others = has.get("additionalProperties", True)
        if others is False:
            return {"type": "object", "properties": {}}
        return {
            "type": "object",
            **(
                {}
                if others is True
                else {"additionalProperties": self.simplify(others, f"{place}.additionalProperties", refs)}
            ),
        }

    def _resolve(self, ref: Any, place: str) -> Any:
        if not isinstance(ref, str) or not ref.startswith("#"):
            raise ValueError(f"{place}: the reference {ref!r} does not lead into the schema itself")
        found = self.root
        for part in ref[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdigit() and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, Mapping) and name in found:
                found = found[name]
            else:
                raise ValueError(f"{place}: the reference {ref!r} leads nowhere")
        return found


def _refuse(keys: set[str], place: str, where: str = "") -> None:
    if keys:
        raise ValueError(f"{place} has {min(keys)!r}" + (f" {where}" if where else "") + ", which is not supported")


def _check_names(value: Any, place: str) -> None:
    """Refuse names of properties that the library would write as they are, though JSON or expressions escape them."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            if json.dumps(name, ensure_ascii=False) != f'"{name}"':
                raise ValueError(f"{place}: a property with the name {name!r}, which JSON escapes, is not supported")
            _check_names(part, place)
            if part is not None and not all(letter.isalnum() or letter in "_-" for letter in name):
                raise ValueError(f"{place}: the name {name!r} inside 'enum' or 'const' is not supported")
    elif isinstance(value, list):
        for part in value:
            _check_names(part, place)


def _check_disjoint(parts: list[dict[str, Any]], place: str) -> None:
    seen: set[str] = set()
    for part in parts:
        kinds = _kinds(part)
        if kinds & seen:
            raise ValueError(
                f"{place} has 'oneOf' with two alternatives that both may be {min(kinds & seen)}; use 'anyOf' if a "
                "value may satisfy both"
            )
        seen |= kinds


def _kinds(part: dict[str, Any]) -> set[str]:
    """Return the types of a simplified schema's values; integers are numbers."""
    if "anyOf" in part:
        return set().union(*(_kinds(each) for each in part["anyOf"]))
    if "enum" in part:
        kinds = {name for value in part["enum"] for name, is_one in _TYPES.items() if is_one(value)}
    else:
        kinds = {part.get("type", "array")}
    return {"number" if kind == "integer" else kind for kind in kinds}
