"""The JSON schema of configurations, from the same classes that read them: editors complete keys,
show what they are for, and underline what would be refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig

DIALECT = GenerateJsonSchema.schema_dialect
"""The version of JSON schema that is written."""


class _Schema(GenerateJsonSchema):
    """Without a title for each key, which would only be its name again."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def config_schema() -> dict[str, Any]:
    """The JSON schema of a run's configuration file: of pairs where it has a section `preference`,
    else of supervised fine-tuning.

    Keys that every run needs are not demanded of a file, as another one or the command line may
    give them. What takes more than one key to refuse is left to the run.
    """
    configs = (RunConfig, PreferenceRunConfig)
    by_class, whole = models_json_schema(
        [(each, "validation") for each in configs], schema_generator=_Schema
    )
    definitions = whole["$defs"]
    for config in configs:
        for section in (config, *_sections(config)):
            definitions[section.__name__].pop("required", None)
    supervised, pairs = (by_class[each, "validation"] for each in configs)
    return {
        "$schema": DIALECT,
        "title": "AlphaToken configuration",
        "if": {"required": ["preference"]},
        "then": pairs,
        "else": supervised,
        "$defs": _without_marks(definitions),
    }


def _sections(config_class: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The classes of sections and of those inside them. What stands in a list is none."""
    for field in config_class.model_fields.values():
        inside = () if get_origin(field.annotation) is list else get_args(field.annotation)
        for each in (field.annotation, *inside):  # one may be optional
            if isinstance(each, type) and issubclass(each, BaseModel):
                yield each
                yield from _sections(each)


def _without_marks(schema: Any) -> Any:
    """A schema without what only we read of a field (`sections.MAY_CHANGE`)."""
    if isinstance(schema, dict):
        return {key: _without_marks(each) for key, each in schema.items() if key != "may_change"}
    return [_without_marks(each) for each in schema] if isinstance(schema, list) else schema
