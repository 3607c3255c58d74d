"""Published mAP in percent, to stand beside our own. Other backbones, images and budgets: for the order, not the value.

Single positive labels: ResNet-50 at 448 px trained end to end, as the authors of BoostLU report them; where they give
no figure, as the authors of large-loss rejection do. Open Images V3: ResNet-101, human labels as they are. Rows of
methods that paml does not have are published figures only.
"""

FIRST = "BoostLU's paper and code (CVPR 2023)"
SECOND = "the large-loss paper and code (CVPR 2022)"
AEVLP = "the table of AEVLP's authors (2025)"
SCPNET = "SCPNet's authors (2023)"

SETS = ("voc", "coco", "nus", "cub")
PUBLISHED: dict[str, tuple[tuple[float | None, ...], str]] = {
    "full labels": ((89.42, 76.78, 52.08, 30.90), FIRST),
    "AN": ((85.89, 64.92, 42.27, 18.31), FIRST),
    "WAN": ((86.5, 64.8, 46.3, 20.3), SECOND),
    "AN-LS": ((87.90, 67.15, 43.77, 16.26), FIRST),
    "ASL": ((87.76, 68.78, 46.93, 18.81), FIRST),
    "EPR": ((85.5, 63.3, 46.0, 20.0), SECOND),
    "ROLE": ((87.77, 67.04, 41.63, 13.66), FIRST),
    "ROLE+LI": ((88.26, 69.12, 45.98, 14.86), FIRST),
    "EM": ((89.09, 70.70, 47.15, 20.85), FIRST),
    "EM+APL": ((89.19, 70.87, 47.59, 21.84), FIRST),
    "LL-R": ((88.27, 70.70, 48.76, 19.56), FIRST),
    "LL-R + BoostLU": ((89.29, 72.89, 49.59, 19.80), FIRST),
    "LL-Ct": ((87.79, 70.29, 48.08, 19.06), FIRST),
    "LL-Ct + BoostLU": ((88.61, 71.78, 48.37, 19.25), FIRST),
    "LL-Cp": ((87.44, 70.27, 47.92, 19.21), FIRST),
    "LL-Cp + BoostLU": ((87.81, 71.41, 48.61, 19.34), FIRST),
    "SMILE": ((86.31, 63.33, 43.61, 18.61), AEVLP),
    "MIME": ((89.20, 72.92, 48.74, 21.89), AEVLP),
    "GR": ((89.83, 73.17, 49.08, 21.64), AEVLP),
    "VLPL": ((89.10, 71.45, 49.55, 24.02), AEVLP),
    "AEVLP": ((90.46, 73.54, 50.70, 24.89), AEVLP),
    "SCPNet (CLIP)": ((91.2, 76.4, 62.0, 25.7), SCPNET),
}
"""Row -> mAP on VOC 2012, COCO 2014, NUS-WIDE and CUB, and who reports it."""

BOOST_ALONE: dict[str, tuple[float, float]] = {
    "AN": (86.10, 64.58),
    "AN + boost at inference": (87.31, 66.27),
    "AN + boost in training": (86.73, 65.33),
}
"""Row -> mAP on VOC and COCO in BoostLU's own ablation, whose AN differs from that of the table above."""

OPENIMAGES: dict[str, tuple[tuple[float, ...], str]] = {
    "CNN-RNN": ((68.76, 69.70, 74.18, 78.52, 84.61, 75.16), FIRST),
    "IU": ((69.5, 70.3, 74.8, 79.2, 85.5, 75.9), SECOND),
    "Curriculum": ((70.37, 71.32, 76.23, 80.54, 86.81, 77.05), FIRST),
    "IMCL": ((70.95, 72.59, 77.64, 81.83, 87.34, 78.07), FIRST),
    "AN-LS": ((68.4, 69.3, 73.7, 77.9, 85.6, 75.0), SECOND),
    "WAN": ((71.8, 72.8, 76.3, 79.7, 84.7, 77.0), SECOND),
    "AN": ((77.1, 78.7, 81.5, 84.1, 88.8, 82.0), SECOND),
    "P-ASL": ((73.19, 78.61, 85.11, 87.70, 90.61, 83.03), FIRST),
    "LL-R": ((77.76, 79.07, 81.94, 84.51, 89.36, 82.53), FIRST),
    "LL-R + BoostLU": ((79.28, 80.81, 83.32, 85.63, 90.27, 83.86), FIRST),
    "LL-Ct": ((77.76, 79.18, 81.97, 84.46, 89.51, 82.58), FIRST),
    "LL-Ct + BoostLU": ((79.43, 80.75, 83.41, 85.70, 90.41, 83.94), FIRST),
    "LL-Cp": ((77.49, 79.22, 81.89, 84.51, 89.18, 82.46), FIRST),
    "LL-Cp + BoostLU": ((79.53, 81.04, 83.40, 85.85, 90.39, 84.04), FIRST),
}
"""Row -> G1 to G5 and all classes, and who reports it."""


def published_map(data_set: str, row: str) -> tuple[float, str] | None:
    """Published mAP in percent of a row on voc, coco, nus, cub or openimages, and who reports it; None where nobody."""
    if data_set == "openimages":
        groups, source = OPENIMAGES.get(row, ((), ""))
        return (groups[-1], source) if groups else None
    values, source = PUBLISHED.get(row, ((None,) * len(SETS), ""))
    value = values[SETS.index(data_set)]
    if value is None and row in BOOST_ALONE and data_set in ("voc", "coco"):
        return BOOST_ALONE[row][SETS.index(data_set)], f"the ablation of {FIRST}"
    return None if value is None else (value, source)
