"""All losses by name. A new one is a file that holds its `LOSS`, and a line here."""

from paml.losses import an, full, iu, ll_cp, ll_ct, ll_r
from paml.losses.base import Loss

LOSSES: dict[str, Loss] = {
    "an": an.LOSS,
    "iu": iu.LOSS,
    "full": full.LOSS,
    "ll-r": ll_r.LOSS,
    "ll-ct": ll_ct.LOSS,
    "ll-cp": ll_cp.LOSS,
}
