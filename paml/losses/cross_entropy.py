"""Binary cross-entropy losses: AN, IU, full labels, and the large-loss methods (Kim et al., CVPR 2022).

    positive: -log p        negative: -log(1 - p)        mean over B x K

The entries differ in what they do with unobserved and rejected labels.
"""

from paml.losses.base import AS_NEGATIVE, AS_POSITIVE, LEFT_OUT, Loss, constant, growing

AN = Loss(unobserved=AS_NEGATIVE)
"""Assume negative: unobserved labels are trained as negatives."""
IU = Loss(unobserved=LEFT_OUT)
"""Ignore unobserved: unobserved labels cost nothing; the sum is divided by B x K as for AN."""
FULL = Loss(unobserved=AS_NEGATIVE, needs_all_observed=True)
"""Full labels: refuses a batch with an unobserved label (checked on the CPU only)."""
LL_R = Loss(unobserved=AS_NEGATIVE, rejected=LEFT_OUT, rate=growing)
"""AN with rejection: rejected labels cost nothing."""
LL_CT = Loss(unobserved=AS_NEGATIVE, rejected=AS_POSITIVE, rate=growing)
"""AN with temporary correction: rejected labels are trained as positives in this step."""
LL_CP = Loss(unobserved=AS_NEGATIVE, rejected=AS_POSITIVE, rate=constant, corrects=True)
"""AN with permanent correction: rejected labels are positives from this step on."""
