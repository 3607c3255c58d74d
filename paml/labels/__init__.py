"""Partial labels: the states of a label, the label table and how it is built."""

from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED, LabelError
from paml.labels.table import LabelTable, Triples, select_images, table_from_triples

__all__ = [
    "NEGATIVE",
    "POSITIVE",
    "UNOBSERVED",
    "LabelError",
    "LabelTable",
    "Triples",
    "select_images",
    "table_from_triples",
]
