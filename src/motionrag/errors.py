"""The error a user is meant to read."""

from __future__ import annotations


class MotionRAGError(Exception):
    """A problem the user can fix.

    The message is one line that names the file or key, says what was expected and what was found, and
    what to do next. The command line prints it after ``error:`` and exits with 2, without a traceback.
    Line breaks in the message (names of files, texts of other libraries) are folded into spaces.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))
