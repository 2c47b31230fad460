"""What a user can put right. Each message is one sentence: what, where, what to do.

`main` turns every `UserError` into that sentence and exit code 2; anything else is our own mistake
and ends with a traceback and exit code 1.
"""

import ast
import logging
import re
import traceback
from contextlib import suppress


class UserError(Exception):
    """Base of all errors that a user can correct."""


class ConfigError(UserError):
    """A configuration field or argument that cannot be used."""


class DataError(UserError):
    """A data set, image or mask that cannot be used."""


class CheckpointError(UserError):
    """A CLIP checkpoint or a training checkpoint that cannot be used."""


class WorkdirError(UserError):
    """An output or cache folder that cannot be used."""


class ProcessError(UserError):
    """Another process of the run is lost."""


TERMINATED = 143  # exit code: 128 + SIGTERM, as a shell reports it


class Preempted(Exception):
    """The run was stopped from outside and has saved its state; the message says at which step."""


def printable(text: str) -> str:
    """Text that may hold a foreign file name, safe on any terminal, log, page or table.

    Control characters (escape codes, line breaks), marks that turn the writing direction and bytes
    that are no text are shown as backslash codes; other letters stay.
    """
    if text.isprintable():  # quickly, of a picture in a page
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(error: BaseException) -> str:
    """The message of an error on one line; its type where it has none."""
    message = str(error)
    if message[:1] in ("'", '"'):  # a KeyError, or what quotes one, is the repr of its message
        with suppress(ValueError, SyntaxError):
            message = str(ast.literal_eval(message))
    return " ".join(message.split()) or type(error).__name__


def of_config(error: Exception, file: str) -> str:
    """What is wrong with a flag or, and in which line, with a config file."""
    text = re.sub(r' Other fields present: "{.*}"', "", one_line(error))  # each with its value
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    if "'get_config'" in text:
        return f"config file {file} has no function get_config"
    if lines:
        return f"config file {file} line {lines[-1]}: {text}"
    return f"config has no such field: {text}" if isinstance(error, AttributeError) else text


class PrintableLines(logging.Formatter):
    """A line for each message, whatever file names it holds."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))
