"""Durations as people write them."""


def duration(seconds: float) -> str:
    """3 h 20 min, 12 min, 45 s."""
    if round(seconds) < 120:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
