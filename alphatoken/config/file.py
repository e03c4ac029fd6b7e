"""Configuration from a YAML file and `section.key=value` overrides, and back; errors name the key
and its nearest."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from alphatoken.config.merging import merged
from alphatoken.config.sections import Section
from alphatoken.errors import ConfigError
from alphatoken.util.files import publish_text
from alphatoken.util.shipped import or_shipped

ConfigT = TypeVar("ConfigT", bound=Section)


class ConfigLoader(yaml.SafeLoader):
    """YAML with its traps removed: `2e-5` is a number, a key given twice is an error, and so is a
    number or date that is none."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._checked: set[yaml.Node] = set()

    def construct_object(
        self,
        node: yaml.Node,
        deep: bool = False,  # noqa: FBT001, FBT002 - PyYAML gives it by place
    ) -> Any:
        """The value. Raises ConstructorError for text that is not of the kind it looks like."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, ArithmeticError, AttributeError, LookupError) as error:
            shown = node.value if len(node.value) <= 40 else f"{node.value[:40]}..."
            why = f": {error}" if isinstance(error, ValueError | ArithmeticError) else ""
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{shown!r} is no {kind}{why}; text belongs in quotes", node.start_mark
            ) from None

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merges what `<<` names into a mapping, after a look at the keys that it gives itself.
        Raises ConstructorError for a key given twice, or that is none."""
        if node not in self._checked:
            self._checked.add(node)  # merged keys, which then stand in it, may be given again
            self._check_keys(node)
        super().flatten_mapping(node)

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            is_merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = key_node.value if is_merge else self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"{key!r} is no key; write text in braces or brackets in quotes",
                    key_node.start_mark,
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)


ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str) -> Any:
    """What a text in YAML holds, as plain values. Raises YAMLError."""
    try:
        return yaml.load(text, ConfigLoader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply, or holds itself") from None


def load_config(
    config_class: type[ConfigT],
    files: Path | Sequence[Path],
    overrides: Sequence[str] = (),
    with_section: Mapping[str, type[ConfigT]] | None = None,
) -> ConfigT:
    """Reads one file, or several of which each overrides keys of those before it (and what belongs
    to another rule of the selection than it names), applies `section.key=value` overrides (values
    are YAML), validates. Raises UserError.

    Values with a section named in `with_section` are of the class given there.
    """
    files = [files] if isinstance(files, Path) else files
    values: dict[str, Any] = {}
    for file in files:
        values = merged(values, sections_of(read_text(file), file))
    for override in overrides:
        _apply_override(values, override)
    for section, other_class in (with_section or {}).items():
        if section in values:
            config_class = other_class
    return validate(config_class, values, " + ".join(map(str, files)))


def validate(config_class: type[ConfigT], values: dict[str, Any], origin: str) -> ConfigT:
    """Validates plain values; `origin` is named in the error. Raises UserError listing every
    mistake."""
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in _explain(config_class, values, error))
        raise ConfigError(f"the configuration {origin} has mistakes:\n{lines}") from None


def save_config(config: Section, file: Path) -> None:
    """Writes the resolved configuration, whole or not at all: every key, defaults included."""
    publish_text(file, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested sections by their dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def may_change(config_class: type[BaseModel], key: str) -> bool:
    """Whether a run and its continuation may have different values of a dotted key: its field, or a
    section it is in, is marked with `sections.MAY_CHANGE`."""
    name, _, rest = key.partition(".")
    field = config_class.model_fields.get(name)
    if field is None:
        return False
    if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("may_change"):
        return True
    section = field.annotation
    if isinstance(section, type) and issubclass(section, BaseModel):
        return may_change(section, rest)
    return False


def read_text(file: Path) -> str:
    """The text of a configuration, or of the shipped one of this name. Raises UserError."""
    try:
        return or_shipped(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not valid YAML, which is text in UTF-8: {error}") from None


def sections_of(text: str, file: Path) -> dict[str, Any]:
    """The sections that the text of a configuration holds, as plain values; `file` is named in the
    error. Raises UserError."""
    try:
        values = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{file} must hold sections like 'model:' and 'data:', but holds "
            f"{type(values).__name__}"
        )
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *sections, last = key.split(".")
    target: Any = values
    for depth, section in enumerate(sections):
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(
                f"override {override!r}: {'.'.join(sections[: depth + 1])} is not a section in the "
                "file"
            )
    try:
        target[last] = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None


def _explain(
    config_class: type[Section], values: dict[str, Any], error: ValidationError
) -> list[str]:
    """One line per wrong key."""
    complaints: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        location = list(_real_location(item["loc"], values, lacks=item["type"] == "missing"))
        key = ".".join(map(str, location))
        if item["type"] == "extra_forbidden":
            complaint = "unknown key" + _nearest(config_class, [str(part) for part in location])
        elif item["type"] == "missing":
            complaint = "required, but not given"
        elif item["type"] == "value_error":
            key, complaint = "", str(item["ctx"]["error"])
        else:
            complaint = f"{item['msg'][0].lower()}{item['msg'][1:]}, not {item['input']!r}"
        complaints.setdefault(key, []).append(complaint)
    return [
        f"{key}: {'; or '.join(lines)}" if key else "; ".join(lines)
        for key, lines in complaints.items()
    ]


def _real_location(
    location: tuple[int | str, ...], values: Any, *, lacks: bool
) -> Iterator[int | str]:
    """A pydantic error location without the names of union branches, which are no keys of the
    user's, and without the place of one entry that was given in place of a list. lacks: whether its
    last part is a key that is not there."""
    for place, part in enumerate(location, start=1):
        if isinstance(values, dict):
            if part in values or (lacks and place == len(location)):
                yield part
                values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int):
            yield part
            values = values[part]


def _nearest(config_class: type[Section], location: list[str]) -> str:
    *_, wrong = location
    known = list(_keys(config_class))
    siblings = [key for key in known if key.split(".")[:-1] == location[:-1]]
    for candidates in (siblings, known):
        by_name = {key.split(".")[-1]: key for key in reversed(candidates)}
        matches = difflib.get_close_matches(wrong, by_name, n=1)
        if matches:
            return f"; did you mean {by_name[matches[0]]}?"
    return f"; known here: {', '.join(key.split('.')[-1] for key in siblings)}" if siblings else ""


def _keys(config_class: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in config_class.model_fields.items():
        yield prefix + name
        for section in (field.annotation, *get_args(field.annotation)):  # one may be optional
            if isinstance(section, type) and issubclass(section, BaseModel):
                yield from _keys(section, f"{prefix}{name}.")
