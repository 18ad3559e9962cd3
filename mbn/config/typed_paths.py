"""The path of a folder as a user types it, quoted for Hydra, whose grammar has a use for `=`, `,`, `(`, `[` and others.

Does not import torch.
"""

import os.path
import re

# The settings that are paths.
PATHS = ("machine.data", "machine.results")


def quoted(text: str) -> str:
    """A setting as Hydra is to read it: a path in quotes, with ~ expanded; any other setting as it is.

    A path that has Hydra's quotes already means the same with and without them. `${...}` stays an interpolation, but a
    `${` that begins none is two letters.
    """
    from hydra.core.override_parser.types import Quote, QuotedString

    key, equals, path = text.partition("=")
    if not equals or key.lstrip("+") not in PATHS:
        return text
    path = os.path.expanduser(_without_quotes(path))  # noqa: PTH111  (Path refuses ~ before a name that is no user's)
    if not _is_interpolation(path):
        path = re.sub(r"(\\*)\$\{", r"\1\1\\${", path)
    return f"{key}={QuotedString(path, Quote.double).with_quotes()}"


def _is_interpolation(path: str) -> bool:
    """Whether OmegaConf can read what a path has of `${...}`, or it has none."""
    from omegaconf.errors import GrammarParseError
    from omegaconf.grammar_parser import parse

    try:
        return "${" not in path or bool(parse(path))
    except GrammarParseError:
        return False


def _without_quotes(path: str) -> str:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not path.startswith(("'", '"')):
        return path
    try:
        override = OverridesParser.create().parse_override(f"key={path}")
    except HydraException:  # a path that happens to begin with a quote
        return path
    return path if override.is_sweep_override() else str(override.value())
