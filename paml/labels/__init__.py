"""Partial labels: the states of a label, the label table and how it is built."""

from paml.labels.build import LabelReport, LabelSettings, build_label_table
from paml.labels.probe import is_probe, probe_mask, split_probe
from paml.labels.single_positive import observe_single_positive, single_positive
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED, LabelError
from paml.labels.table import LabelTable, Triples, select_images, table_from_triples

__all__ = [
    "NEGATIVE",
    "POSITIVE",
    "UNOBSERVED",
    "LabelError",
    "LabelReport",
    "LabelSettings",
    "LabelTable",
    "Triples",
    "build_label_table",
    "is_probe",
    "observe_single_positive",
    "probe_mask",
    "select_images",
    "single_positive",
    "split_probe",
    "table_from_triples",
]
