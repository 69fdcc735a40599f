"""From sketches to alignment and interaction, and the scale of the redundancy term (method.md section 2).

    U_z = <P G(z), g_V> - lambda <P G(z), sum_{j already drawn} P G(j)>                                      (Eq. 23)

The learning rate is part of P (kappa): it enters the alignment once and the interaction squared, nothing else is
multiplied. Legend: N candidates, R scored layers, m sketch dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_opus.config import RedundancyConfig


def alignment(phi_NRm: Tensor, psi_Rm: Tensor) -> Tensor:
    """[N] float64: sum over layers of <phi_r(z), psi_r>."""
    return torch.mv(phi_NRm.flatten(1).double(), psi_Rm.flatten().double())


def interaction(phi_NRm: Tensor) -> Tensor:
    """[N, N] float64: sum over layers of <phi_r(z), phi_r(j)>; symmetric."""
    flat = phi_NRm.flatten(1)
    # float32 products, but exactly symmetric: a draw must not depend on which half was read
    gram = (flat @ flat.T).double()
    return (gram + gram.T) / 2


def redundancy_scale(align: Tensor, inter: Tensor, k: int, config: RedundancyConfig) -> float:
    """lambda of the formula above.

    `paper`: 1. `off`: 0. `matched`: the mean absolute redundancy of a half-filled batch (k / 2 candidates drawn) is
    `fraction` times the standard deviation of the alignment.
    """
    n = len(align)
    if config.scale == "off" or n < 2:
        return 0.0
    if config.scale == "paper":
        return 1.0
    others = (inter.sum(1) - inter.diagonal()) / (n - 1)  # mean interaction of each candidate with the others
    typical = (others.abs().mean() * k / 2).item()
    return config.fraction * align.std().item() / typical if typical > 0 else 0.0
