"""The errors of this package. A message gives the value, what is allowed and how to fix it.

Commands print a PamlError as one line and exit with status 1.
"""


class PamlError(Exception):
    """A user error. Retrying without a change fails again, so workers are not restarted."""


class SettingsError(PamlError, ValueError):
    """A setting that is not allowed, or settings that contradict each other."""


class UsageError(SettingsError):
    """A command-line argument that is unknown, missing or refused."""


def check_setting(valid: bool, name: str, value: object, allowed: str) -> None:
    """Raise SettingsError unless `valid`."""
    if not valid:
        raise SettingsError(f"{name} is {value!r}; it must be {allowed}")


class DataError(PamlError):
    """Labels, shards or images that cannot be used."""


class LabelError(PamlError, ValueError):
    """Labels or label tables that are malformed or inconsistent."""


class StorageError(PamlError, OSError):
    """A storage operation that failed; the message has the path, the reason and the fix. Unlike other errors, it may
    not occur again: workers are restarted."""


class TooLargeError(StorageError):
    """A file that exceeds its reader's size limit."""


class CheckpointError(PamlError):
    """A checkpoint that is missing, incomplete, damaged or of another run."""


class NonFiniteLossError(PamlError):
    """The loss of a batch, or a weight, is NaN or infinite."""


class Stopped(KeyboardInterrupt):
    """The run was stopped by a signal (SIGTERM from `ray job stop`, or Ctrl-C), whose number is the argument.

    It is a KeyboardInterrupt because Ray drops any other exception raised by a signal handler while Ray waits.
    """
