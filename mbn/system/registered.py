"""Loading what a registry names by its path."""

from pkgutil import resolve_name
from typing import Any

from mbn.system.errors import UserError


def registered(path: str, registry: str) -> Any:
    """The object of a dotted path that an entry of a registry names. Errors: UserError where there is no such thing."""
    try:
        return resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{registry} names {path}, which cannot be loaded ({error}): correct the entry, or what it names."
        ) from None
