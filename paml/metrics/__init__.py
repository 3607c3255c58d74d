"""Scores over annotated pairs: average precision, the five class groups, micro metrics, tables."""

from paml.metrics.average_precision import average_precision_by_class
from paml.metrics.pairs import Pairs, gather_pairs, join_pairs, pairs_of, pairs_of_states, read_pairs, write_pairs
from paml.metrics.partial import PartialAveragePrecision, average_precision
from paml.metrics.scores import MetricSettings, Scores, five_groups, score_table, scores, write_per_class

__all__ = [
    "MetricSettings",
    "Pairs",
    "PartialAveragePrecision",
    "Scores",
    "average_precision",
    "average_precision_by_class",
    "five_groups",
    "gather_pairs",
    "join_pairs",
    "pairs_of",
    "pairs_of_states",
    "read_pairs",
    "score_table",
    "scores",
    "write_pairs",
    "write_per_class",
]
