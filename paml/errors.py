"""Errors that a user can mend. Each message says what was found, what is allowed and how to mend it."""


class PamlError(Exception):
    """Trying again unchanged gives the same error: jobs print it and exit, workers are not restarted."""


class SettingsError(PamlError, ValueError):
    """A setting, or two that contradict each other."""


class DataError(PamlError):
    """Labels, shards or images that cannot be used."""


class CheckpointError(PamlError):
    """A checkpoint that is absent, incomplete or of another run."""


class NonFiniteLossError(PamlError):
    """The loss of a batch is NaN or infinite."""


class Stopped(KeyboardInterrupt):
    """Somebody stops the run (SIGTERM from `ray job stop`, Ctrl-C); holds the signal's number.

    A KeyboardInterrupt, since Ray drops every other exception that a signal's handler raises while Ray waits.
    """
