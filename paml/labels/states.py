"""The codes of a label's state. No other file writes these numbers."""

POSITIVE = 1
NEGATIVE = 0
UNOBSERVED = -1

STATE_OF_TEXT = {
    **dict.fromkeys(("1", "1.0", "true", "positive"), POSITIVE),
    **dict.fromkeys(("0", "0.0", "false", "negative"), NEGATIVE),
}
"""How label files write a state, in lower case."""
