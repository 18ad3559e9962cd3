"""The part of `train.py --help` with every setting as it is typed, its value and what it means.

Does not import torch.
"""

import dataclasses
import textwrap

from mbn.config.schema import Config
from mbn.system.setting_fields import leaves, typed

# What one sets most comes first; what is not named here follows, the machine last.
FIRST = ("batch_size", "forwards", "seed", "precision", "schedule", "norm", "model", "dataset", "optimizer")
# Where explanations begin and end.
COLUMN, WIDTH = 36, 100


def settings_page(config: Config) -> str:
    """The settings in the order in which one reads them, a group after the other."""
    fields = sorted(dataclasses.fields(config), key=lambda f: [*FIRST, f.name].index(f.name))
    lines = []
    for field in fields:
        value, explanation = getattr(config, field.name), field.metadata["explanation"]
        if not dataclasses.is_dataclass(value):
            lines += _explained(f"{field.name}={typed(value)}", explanation)
            continue
        inner = [(key, f.metadata["explanation"], v) for key, f, v in leaves(value, f"{field.name}.")]
        title = field.name
        if inner[0][0] == f"{field.name}.name":  # the choice of the group, which has its settings
            (_, explanation, name), *inner = inner
            title += f"={name}"
        lines += ["", *_explained(title, explanation)]
        for key, text, v in inner:
            lines += _explained(f"  {key}={typed(v)}", text)
    return "\n".join(lines)


def _explained(setting: str, explanation: str) -> list[str]:
    """A setting, and its explanation beside it or, where it is long, below."""
    texts = textwrap.wrap(explanation, WIDTH - COLUMN, break_on_hyphens=False) or [""]
    below = len(setting) > COLUMN - 2
    lines = [setting] if below else [f"{setting:<{COLUMN}}{texts[0]}".rstrip()]
    return [*lines, *(" " * COLUMN + text for text in (texts if below else texts[1:]))]
