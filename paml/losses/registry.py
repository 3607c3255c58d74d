"""All losses by name. A new one is a file that holds its `LOSS`, and a line here."""

from paml.losses import an, an_ls, asl, em, epr, full, gr, hill, iu, ll_cp, ll_ct, ll_r, p_asl, splc, wan
from paml.losses.base import Loss

LOSSES: dict[str, Loss] = {
    "an": an.LOSS,
    "iu": iu.LOSS,
    "full": full.LOSS,
    "ll-r": ll_r.LOSS,
    "ll-ct": ll_ct.LOSS,
    "ll-cp": ll_cp.LOSS,
    "wan": wan.LOSS,
    "an-ls": an_ls.LOSS,
    "epr": epr.LOSS,
    "asl": asl.LOSS,
    "p-asl-ignore": p_asl.IGNORE,
    "p-asl-negative": p_asl.NEGATIVE,
    "p-asl-selective": p_asl.SELECTIVE,
    "em": em.LOSS,
    "hill": hill.LOSS,
    "splc": splc.LOSS,
    "gr": gr.LOSS,
}
