"""Errors a user can cause or mend: shown as one sentence, without a traceback."""


class UserError(Exception):
    """The message is one sentence that says what to do. `code` is the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class ConfigError(UserError):
    """A configuration that cannot be run; the message says what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=2)
