"""LL-Ct, temporary correction (Kim et al., CVPR 2022): the rejected labels cost -log p this once. Mean over B x K."""

from paml.losses.base import AS_NEGATIVE, AS_POSITIVE, Loss, growing

LOSS = Loss(unobserved=AS_NEGATIVE, rejected=AS_POSITIVE, rate=growing, rejects=True)
