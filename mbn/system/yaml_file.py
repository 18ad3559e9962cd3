"""YAML files, read strictly: what cannot be read, or can be read in two ways, is refused in one sentence."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mbn.system.errors import ConfigError
from mbn.system.setting_fields import shown


class _Loader(yaml.SafeLoader):
    """As on a command line, 1e-4 is a number, and a date is a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+\.?|[0-9]*\.[0-9]+)e[-+]?[0-9]+$", re.I), list("-+.0123456789")
)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)

# More values than any file of ours has: aliases that repeat themselves make one without end.
MOST = 20_000
_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq", "merge", "timestamp")
}
# Of what YAML reads as a number or as true or false, what nobody reads in another way: not 010, 0x10, 1:30, yes, no.
_PLAIN = re.compile(r"[-+]?(0|[1-9][0-9_]*)?(\.[0-9_]*)?(e[-+]?[0-9]+)?|[-+]?\.(inf|nan)|true|false", re.IGNORECASE)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a file holds, empty for an empty file. Errors: ConfigError."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8-sig"))
        if not loader.check_node():
            return {}
        node = loader.get_node()
        if loader.check_node():
            raise ConfigError(f"{path} holds a second document after a line with ---: make two files of it.")
        for line, fault in _faults(node):
            raise ConfigError(f"{path}, line {line}: {fault}.")
        content = loader.construct_document(node)
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}): make it a file that can be read.") from None
    except UnicodeDecodeError as error:
        before = error.object[: error.start].count(b"\n")
        raise ConfigError(f"{path}, line {before + 1}: this is not UTF-8: save the file in this encoding.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}" if mark else f"{path}"
        tab = ": write spaces instead of tabs" if "'\\t'" in str(error.problem) else ""
        raise ConfigError(f"{where} is not YAML: {error.problem or error.context}{tab}.") from None
    except yaml.YAMLError as error:  # a character that no text may have
        raise ConfigError(f"{path} is not YAML: {str(error).splitlines()[0]}.") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply: correct it.") from None
    except ValueError as error:  # a number of thousands of digits, a day that does not exist
        raise ConfigError(f"{path} holds an impossible value ({str(error).partition(';')[0]}): correct it.") from None
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{path} must hold lines such as key: value, not {type(content).__name__} alone.")
    return content or {}


def _faults(root: yaml.Node) -> Iterator[tuple[int, str]]:
    """What is wrong in a document, each fault with its line."""
    left, count = [root], 0
    while left:
        node = left.pop()
        line, count = node.start_mark.line + 1, count + 1
        if count > MOST:
            yield line, "a value that repeats itself makes this file too long: leave the anchors (&) out"
        if node.tag not in _TAGS:
            yield line, f"{shown(node.tag.removeprefix('tag:yaml.org,2002:'))} is not allowed here: use plain values"
        if isinstance(node, yaml.ScalarNode):
            kind = node.tag.rpartition(":")[2]
            if node.style is None and kind in ("int", "float", "bool") and not _PLAIN.fullmatch(node.value):
                read = f"{yaml.safe_load(node.value)}".lower()
                yield line, f"{shown(node.value)} is read as {read}: write {read}, or quotes around a text"
        elif isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, _ in node.value:
                if str(key.value) in keys:
                    yield key.start_mark.line + 1, f"{shown(key.value)} is set a second time: leave one of the two"
                keys.add(str(key.value))
            left += [part for pair in node.value for part in pair]
        else:
            left += node.value
