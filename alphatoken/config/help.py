"""Command-line arguments of the recipes and the table of keys that `--help` prints."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table

from alphatoken.config.choices import OneOf
from alphatoken.config.file import ConfigT, load_config
from alphatoken.config.sections import Section
from alphatoken.errors import ConfigError

PURPOSES: dict[str, tuple[str, ...]] = {
    "What is trained, on which rows": ("model", "data"),
    "Which tokens count": ("valuation", "selection", "fisher", "reference"),
    "What is minimised on pairs": ("preference",),
    "How long, how fast, where it is kept": ("train", "optim", "deepspeed"),
    "What is seen of it": ("logging", "evaluation"),
}
"""Sections by what somebody wants to set, in the order of `--help`."""


def parse_arguments(
    config_class: type[ConfigT],
    description: str,
    arguments: Sequence[str] | None = None,
    with_section: Mapping[str, type[ConfigT]] | None = None,
) -> ConfigT:
    """The command line of a recipe: `--config FILE ... [section.key=value ...]`, in any order,
    where keys of a later file count, and keys given here before all. `--help` explains every
    field.

    `with_section` as in `load_config`.
    """
    parser = _Parser(description=description, add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config", type=Path, action="append")
    parser.add_argument(
        "--local_rank",
        "--local-rank",
        type=int,
        help="set by the launcher; LOCAL_RANK is what counts",
    )
    parser.add_argument("overrides", nargs="*")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.help:
        print_fields(config_class, description)
        raise SystemExit(0)
    if parsed.config is None:
        raise ConfigError(
            "give the configuration: --config FILE [section.key=value ...] (--help lists every key)"
        )
    return load_config(config_class, parsed.config, parsed.overrides, with_section)


class _Parser(argparse.ArgumentParser):
    """Refuses arguments as configurations are refused."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def print_fields(config_class: type[Section], description: str) -> None:
    """Every key with its default and its one-line why."""
    console = Console()
    usage = (
        "Usage: --config FILE [--config FILE ...] [section.key=value ...]   "
        "(values are YAML; later files override earlier ones)"
    )
    console.print(f"{description}\n\n{usage}\n", highlight=False, markup=False)
    for purpose, sections in PURPOSES.items():
        given = [section for section in sections if section in config_class.model_fields]
        if given:
            console.rule(f"[bold]{purpose}", align="left")
        for section in given:
            section_class = config_class.model_fields[section].annotation
            assert isinstance(section_class, type)
            assert issubclass(section_class, BaseModel)
            about = " ".join((section_class.__doc__ or "").split())
            table = Table("key", "default", "why", title_justify="left", expand=True)
            table.title = f"[bold]{section}[/bold]  {about}"
            choice = getattr(config_class, "default_choice", {}).get(section, {})
            _add_rows(table, section, section_class, choice)
            console.print(table)


def _add_rows(
    table: Table, prefix: str, section_class: type[BaseModel], choice: Mapping[str, Any]
) -> None:
    """A row for each key, those of sections inside the section included. choice: what a default is
    where the configuration names no rule of its own."""
    for name, field in section_class.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            _add_rows(table, f"{prefix}.{name}", field.annotation, {})
            continue
        default = "(required)"
        if not field.is_required():
            default = _shown(_plain(field))
        if name in choice and _shown(choice[name]) != default:
            default = f"{_shown(choice[name])}, or {default} beside another rule"
        table.add_row(f"{prefix}.{name}", default, (field.description or "") + _choices(field))


def _shown(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).split("\n")[0]


def _plain(field: FieldInfo) -> Any:
    default = field.get_default(call_default_factory=True)
    if isinstance(default, tuple):
        return list(default)
    return str(default) if isinstance(default, Path) else default


def _choices(field: FieldInfo) -> str:
    """The allowed words of a field that is a Literal or a `OneOf`, for the help text."""
    words = [*_words(field.annotation), *_words_of_metadata(field.metadata)]
    return f" One of: {', '.join(words)}." if len(words) > 1 else ""


def _words(annotation: Any) -> Iterator[str]:
    for argument in get_args(annotation):
        if isinstance(argument, str):
            yield argument
        else:
            yield from _words(argument)
    yield from _words_of_metadata(getattr(annotation, "__metadata__", ()))


def _words_of_metadata(metadata: Iterable[Any]) -> Iterator[str]:
    for annotated in metadata:
        if isinstance(annotated, OneOf):
            yield from annotated.names
