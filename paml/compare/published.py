"""Published mAP in percent. Backbones, images and budgets differ from ours: compare the order of rows, not the values.

Single positive labels: ResNet-50 at 448 px trained end to end, from the authors of BoostLU; if they report no value,
from the authors of large-loss rejection. Open Images V3: ResNet-101 with the human-verified labels.
"""

BOOSTLU = "BoostLU's paper and code (CVPR 2023)"
LARGE_LOSS = "the large-loss paper and code (CVPR 2022)"
ABLATION = f"the ablation of {BOOSTLU}"
AEVLP = "the table of AEVLP's authors (2025)"

SINGLE_POSITIVE: dict[str, tuple[tuple[float, ...], str]] = {
    "full labels": ((89.42, 76.78, 52.08, 30.90), BOOSTLU),
    "AN": ((85.89, 64.92, 42.27, 18.31), BOOSTLU),
    "WAN": ((86.5, 64.8, 46.3, 20.3), LARGE_LOSS),
    "AN-LS": ((87.90, 67.15, 43.77, 16.26), BOOSTLU),
    "ASL": ((87.76, 68.78, 46.93, 18.81), BOOSTLU),
    "EPR": ((85.5, 63.3, 46.0, 20.0), LARGE_LOSS),
    "ROLE": ((87.77, 67.04, 41.63, 13.66), BOOSTLU),
    "ROLE+LI": ((88.26, 69.12, 45.98, 14.86), BOOSTLU),
    "EM": ((89.09, 70.70, 47.15, 20.85), BOOSTLU),
    "EM+APL": ((89.19, 70.87, 47.59, 21.84), BOOSTLU),
    "LL-R": ((88.27, 70.70, 48.76, 19.56), BOOSTLU),
    "LL-R + BoostLU": ((89.29, 72.89, 49.59, 19.80), BOOSTLU),
    "LL-Ct": ((87.79, 70.29, 48.08, 19.06), BOOSTLU),
    "LL-Ct + BoostLU": ((88.61, 71.78, 48.37, 19.25), BOOSTLU),
    "LL-Cp": ((87.44, 70.27, 47.92, 19.21), BOOSTLU),
    "LL-Cp + BoostLU": ((87.81, 71.41, 48.61, 19.34), BOOSTLU),
    "GR": ((89.83, 73.17, 49.08, 21.64), AEVLP),
    "AN + boost at inference": ((87.31, 66.27), ABLATION),
    "AN + boost in training": ((86.73, 65.33), ABLATION),
}
"""Row -> mAP on VOC 2012, COCO 2014, NUS-WIDE and CUB, and its source. In the ablation AN has 86.10 and 64.58."""

OPEN_IMAGES: dict[str, tuple[float, str]] = {
    "Curriculum": (77.05, BOOSTLU),
    "AN-LS": (75.0, LARGE_LOSS),
    "WAN": (77.0, LARGE_LOSS),
    "AN": (82.0, LARGE_LOSS),
    "P-ASL": (83.03, BOOSTLU),
    "LL-R": (82.53, BOOSTLU),
    "LL-R + BoostLU": (83.86, BOOSTLU),
    "LL-Ct": (82.58, BOOSTLU),
    "LL-Ct + BoostLU": (83.94, BOOSTLU),
    "LL-Cp": (82.46, BOOSTLU),
    "LL-Cp + BoostLU": (84.04, BOOSTLU),
}
"""Row -> mAP of all classes of Open Images V3, and its source."""


def published_map(data_set: str, row: str) -> tuple[float, str] | None:
    """Published mAP in percent of a row on voc, coco, nus, cub or openimages, and its source; None if unknown."""
    if data_set == "openimages":
        return OPEN_IMAGES.get(row)
    values, source = SINGLE_POSITIVE.get(row, ((), ""))
    known = dict(zip(("voc", "coco", "nus", "cub"), values, strict=False))
    return (known[data_set], source) if data_set in known else None
