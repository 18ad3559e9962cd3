"""Durations as people write them."""

import re


def duration(seconds: float) -> str:
    """3 h 20 min, 12 min, 45 s."""
    if round(seconds) < 120:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def in_seconds(text: str) -> float:
    """90s, 9m, 1.5h or 1h30m in seconds. Errors: ValueError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text)
    if not parts or "".join(n + unit for n, unit in parts) != text:
        raise ValueError(f"must be a time such as 90s, 9m or 1h30m, not {text!r}")
    return sum(float(n) * {"s": 1, "m": 60, "h": 3600}[unit] for n, unit in parts)
