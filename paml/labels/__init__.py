"""Partial labels: the states of a label, the label table and how it is built."""

from paml.errors import LabelError
from paml.labels.build import LabelSettings, build_label_table
from paml.labels.edit import export_classes, export_csv, filter_labels, filter_table, merge, split
from paml.labels.probe import is_probe, split_probe
from paml.labels.regimes import (
    observe_random_fraction,
    observe_single_positive,
    single_positive,
)
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.labels.table import LabelTable, Triples, table_from_triples
from paml.labels.verdicts import apply_verdicts

__all__ = [
    "NEGATIVE",
    "POSITIVE",
    "UNOBSERVED",
    "LabelError",
    "LabelSettings",
    "LabelTable",
    "Triples",
    "apply_verdicts",
    "build_label_table",
    "export_classes",
    "export_csv",
    "filter_labels",
    "filter_table",
    "is_probe",
    "merge",
    "observe_random_fraction",
    "observe_single_positive",
    "single_positive",
    "split",
    "split_probe",
    "table_from_triples",
]
