"""The link function of RNA→ATAC: what the inner product x of a cell's state and a cCRE's loadings adds to the log odds.

Loadings are ridge regression of 0/1 on the states, in units of p (1 − p), where p is the cCRE's mean. So
p + p (1 − p) x is what they say of the probability, and the link is what its log odds have more than those of p. Where
less than half of p, or of 1 − p, would be left, log odds go straight on, with the slope that they have there. Log odds
that are straight everywhere overshoot at seldom open cCREs; if they are straight below 0 only, too many cCREs are open
in all (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

LINK_VERSION = 2
"""Earlier checkpoints and compact predictions have link 1: x below 0 and log(1 + x) above."""
LEFT = 0.5
"""The share of p, or of 1 − p, that is left where log odds begin to go straight on."""
COLUMNS = 1 << 14
"""cCREs computed at once: what fits the cache takes a third of the time."""


def change_of_log_odds(x: Tensor, prior: Tensor, version: int = LINK_VERSION) -> Tensor:
    """Return what is added to the log odds of the mean; as `x`.

    Parameters
    ----------
    x
        Inner products, [..., F].
    prior
        Log odds of the mean, [F]; minus infinity for a cCRE that is never open.
    version
        Of the link.
    """
    if version == 1:
        return x.clamp(max=0) + x.clamp(min=0).log1p()
    parts = zip(x.split(COLUMNS, -1), prior.split(COLUMNS), strict=True)
    return torch.cat([_change(some, of_them) for some, of_them in parts], dim=-1)


def _change(x: Tensor, prior: Tensor) -> Tensor:
    p, q = prior.sigmoid(), (-prior).sigmoid()
    one, inner = torch.ones_like(p), x.clamp((LEFT - 1) / q, (1 - LEFT) / p)
    closed = torch.addcmul(one, p, inner, value=-1)  # q − p q x over q
    open_ = torch.addcmul(one, q, inner)  # p + p q x over p
    return torch.addcdiv((open_ / closed).log(), x - inner, open_ * closed)
