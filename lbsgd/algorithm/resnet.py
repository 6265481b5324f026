"""The paper's networks: torchvision's ResNets with the initialisation of Sec. 5.1."""

from __future__ import annotations

import torch
import torchvision

from lbsgd.algorithm.seeded import seeded
from lbsgd.errors import ConfigError


def resnet(name: str, num_classes: int, zero_last_gamma: bool = True, seed: int = 0) -> torch.nn.Module:
    """Return torchvision's resnet18 ... resnet152, with stride 2 on the 3x3 convolution, initialised as in Sec. 5.1.

        convolutions             He et al.: N(0, 2 / fan_out)
        fully connected layer    N(0, 0.01²), bias 0
        batch norm               γ = 1, β = 0; γ = 0 in the last one of each residual block if zero_last_gamma

    The weights are drawn from `seed` alone, on the CPU whatever the default device, so every process builds the same
    network. The caller's random state does not change, on GPUs either.

    Raises ConfigError for any other name.
    """
    known = [model for model in torchvision.models.list_models(torchvision.models) if model.startswith("resnet")]
    if name not in known:
        raise ConfigError(
            f"{name!r} is none of torchvision's ResNets ({', '.join(known)}); for another network override `network()` "
            "in your recipe (docs/running.md)"
        )
    device = torch.get_default_device()
    with seeded(seed):
        network: torch.nn.Module = torchvision.models.get_model(
            name, num_classes=num_classes, zero_init_residual=zero_last_gamma
        )
        torch.nn.init.normal_(network.get_parameter("fc.weight"), std=0.01)
        torch.nn.init.zeros_(network.get_parameter("fc.bias"))
    return network.to(device)
