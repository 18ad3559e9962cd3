from running import after, here, left, reads, whole  # noqa: F401
