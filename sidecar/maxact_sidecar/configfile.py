"""The configuration file: YAML with the keys of `config.Settings`, below what the command line and variables say.

Whatever is wrong in it is named with file and line.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from maxact_sidecar.config import ConfigError, Place, Settings, describe


@dataclass(frozen=True, slots=True)
class Document:
    """A file that was read: its keys and values, and where they stand."""

    path: Path
    values: Mapping[str, Any]
    root: yaml.Node | None

    def line(self, place: Place) -> int:
        """Line of a value, or of the innermost thing around it that is in the file; counted from 1."""
        node = self.root
        line = 0
        for part in place:
            if isinstance(node, yaml.MappingNode):
                pair = next((pair for pair in node.value if pair[0].value == part), None)
                if pair is None:
                    break
                line, node = pair[0].start_mark.line, pair[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line
        return line + 1


def read_settings(path: Path | None, given: Mapping[str, Any]) -> Settings:
    """The `Settings` of a file, if there is one, with ``given`` values in place of those of the file.

    Raises `ConfigError` with one line per problem.
    """
    document = _read(path) if path else Document(Path(), {}, None)
    _refuse_unknown(document)
    try:
        return Settings(**{**document.values, **given})
    except ValidationError as error:

        def where(place: Place) -> str:
            in_file = bool(place) and place[0] in document.values and place[0] not in given
            return f"{document.path}:{document.line(place)}: " if in_file else ""

        raise ConfigError("\n".join(describe(error, where))) from None


def _read(path: Path) -> Document:
    try:
        text = path.read_text()
        root = yaml.compose(text, yaml.SafeLoader)
        values = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"config: {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config: {path}: is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: is not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {str(error).splitlines()[0]}") from None
    if values is None:
        return Document(path, {}, None)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}:1: is not a mapping of settings; write lines like hold: 30")
    return Document(path, values, root)


def _refuse_unknown(document: Document) -> None:
    problems = []
    for key in document.values:
        if key not in Settings.model_fields:
            near = difflib.get_close_matches(key, Settings.model_fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"settings are {', '.join(Settings.model_fields)}"
            problems.append(f"{document.path}:{document.line((key,))}: {key}: is not a setting; {hint}")
    if isinstance(document.root, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, _ in document.root.value:
            if key_node.value in seen:
                line = key_node.start_mark.line + 1
                problems.append(f"{document.path}:{line}: {key_node.value}: is set twice")
            seen.add(key_node.value)
    if problems:
        raise ConfigError("\n".join(problems))
