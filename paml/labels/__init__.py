"""Partial labels: the states of a label, the label table and how it is built."""

from paml.labels.build import LabelReport, LabelSettings, build_label_table
from paml.labels.edit import MergeReport, cut, export_classes, export_csv, keep, merge, split, split_by_keys
from paml.labels.partial import observe_class_wise, observe_positives, observe_random_share
from paml.labels.probe import is_probe, probe_mask, split_probe
from paml.labels.single_positive import observe_single_positive, single_positive
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED, LabelError
from paml.labels.table import LabelTable, Triples, select_images, table_from_triples
from paml.labels.verdicts import VerdictReport, apply_verdicts

__all__ = [
    "NEGATIVE",
    "POSITIVE",
    "UNOBSERVED",
    "LabelError",
    "LabelReport",
    "LabelSettings",
    "LabelTable",
    "MergeReport",
    "Triples",
    "VerdictReport",
    "apply_verdicts",
    "build_label_table",
    "cut",
    "export_classes",
    "export_csv",
    "is_probe",
    "keep",
    "merge",
    "observe_class_wise",
    "observe_positives",
    "observe_random_share",
    "observe_single_positive",
    "probe_mask",
    "select_images",
    "single_positive",
    "split",
    "split_by_keys",
    "split_probe",
    "table_from_triples",
]
