"""The codes of a label's state. No other file writes these numbers."""

POSITIVE = 1
NEGATIVE = 0
UNOBSERVED = -1


class LabelError(ValueError):
    """Labels that cannot be used: the message says what was found, what is allowed and how to mend it."""
