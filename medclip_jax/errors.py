"""What a user can put right. Each message is one sentence: what, where, what to do.

`main` turns every `UserError` into that sentence and exit code 2; anything else is our own mistake
and ends with a traceback and exit code 1.
"""


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
