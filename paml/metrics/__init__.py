"""Scores over annotated pairs: average precision, the five class groups, micro figures, tables."""

from paml.metrics.average_precision import average_precision_by_class, micro_average_precision
from paml.metrics.pairs import (
    Pairs,
    gather_pairs,
    join_pairs,
    pairs_of,
    pairs_of_states,
    read_pairs,
    write_pairs,
)
from paml.metrics.scores import (
    PUBLISHED_CONVENTIONS,
    MetricSettings,
    Scores,
    five_groups,
    score_table,
    scores,
    write_per_class,
)

__all__ = [
    "PUBLISHED_CONVENTIONS",
    "MetricSettings",
    "Pairs",
    "Scores",
    "average_precision_by_class",
    "five_groups",
    "gather_pairs",
    "join_pairs",
    "micro_average_precision",
    "pairs_of",
    "pairs_of_states",
    "read_pairs",
    "score_table",
    "scores",
    "write_pairs",
    "write_per_class",
]
