"""A configuration as JSON: what our own weight files have beside them, and arrays of other programs.

Beyond a configuration's own fields it has facts that follow from them or from the arrays, spelled out for whoever reads
the file elsewhere; they must be true where they are given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lightseq_backend.config import Config, DecodingOptions, GptConfig, TransformerConfig, dialect_named
from lightseq_backend.errors import ConfigError
from lightseq_backend.weights.layout import GPT, TRANSFORMER, layout_of

CLASSES: dict[str, type[Config]] = {TRANSFORMER: TransformerConfig, GPT: GptConfig}


def write(config: Config, tied: bool) -> dict[str, Any]:
    """tied: whether the output projection is the (target) token table."""
    return {"kind": layout_of(config).kind, **_facts(config, tied), **_fields(config)}


def read(values: Mapping[str, Any], tied: bool, faults: list[str]) -> Config | None:
    """The configuration; None where `faults` grew, by a line each."""
    if values.get("kind") not in CLASSES:
        faults.append(f"kind is {values.get('kind')!r}; kinds are {', '.join(CLASSES)}")
        return None
    made = CLASSES[values["kind"]]
    given = {name: value for name, value in values.items() if name not in ("kind", *FACTS)}
    before = len(faults)
    settings = _typed(made, given, "", faults)
    if "decoding" in settings:
        settings["decoding"] = DecodingOptions(**_typed(DecodingOptions, settings["decoding"], "decoding.", faults))
    try:
        if "dialect" in settings:
            settings["dialect"] = dialect_named(settings["dialect"])
        config = None if len(faults) > before else made(**settings)
    except ConfigError as error:
        faults += str(error).splitlines()
        return None
    if config is not None:
        for name, value in _facts(config, tied).items():
            if values.get(name, value) != value:
                faults.append(f"{name} is {values[name]!r}; what else the file says makes it {value!r}")
    return config if len(faults) == before else None


FACTS = ("head_size", "tied_output")


def _facts(config: Config, tied: bool) -> dict[str, Any]:
    return dict(zip(FACTS, (config.hidden // config.heads, tied)))


def _fields(config: Config) -> dict[str, Any]:
    return {**dataclasses.asdict(config), "dialect": config.dialect.name}


def _typed(made: type, values: dict[str, Any], prefix: str, faults: list[str]) -> dict[str, Any]:
    """The values that are fields of a dataclass and of their types; whatever else there is goes to `faults`."""
    fields = {field.name: field for field in dataclasses.fields(made)}
    for name in sorted(set(values) - set(fields)):
        faults.append(f"{prefix}{name} is no setting of such a model")
    kept = {}
    for name, field in fields.items():
        if name in values:
            value = values[name]
            if not _fits(value, str(field.type)):
                faults.append(f"{prefix}{name} is {value!r}; it must be {_wanted(str(field.type))}")
                continue
            kept[name] = _as_tuples(value)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            faults.append(f"{prefix}{name} is missing")
    return kept


_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
_JSON_TYPES = {
    "Dialect": "str",
    "DecodingOptions": "dict",
    "Ids": "list of ids",
    "tuple[Ids, ...]": "list of lists",
    "tuple[StopWord, ...]": "list of texts and lists",
}


def _wanted(annotation: str) -> str:
    return " | ".join(_JSON_TYPES.get(part, part) for part in annotation.split(" | "))


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _fits(value: Any, annotation: str) -> bool:
    for part in _wanted(annotation).split(" | "):
        if part == "None" and value is None:
            return True
        if part == "dict" and isinstance(value, dict):
            return True
        if part == "list of ids" and isinstance(value, list):
            return all(_fits(id_, "int") for id_ in value)
        if part == "list of lists" and isinstance(value, list):
            return all(_fits(ids, "Ids") for ids in value)
        if part == "list of texts and lists" and isinstance(value, list):
            return all(isinstance(word, str) or _fits(word, "Ids") for word in value)
        if part in _TYPES and isinstance(value, _TYPES[part]) and (part == "bool") == isinstance(value, bool):
            return True
    return False
