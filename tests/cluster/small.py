"""A recipe for tests of hosts: a residual network that starts and trains in no time.

    deepspeed --hostfile hosts tests/cluster/small.py --deepspeed_config tests/cluster/small.json --fake_data

GELU replaces ReLU: the kinks of ReLU amplify rounding until two otherwise equal runs differ, and no bound could tell
that from a mistake. Loss and evaluation are those of recipes/resnet50.py.
"""

import sys
from pathlib import Path

from lbsgd.commands.train import main

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

from resnet50 import ResNet50


class Small(ResNet50):
    name = "small"

    def network(self, num_classes, plan):
        from torch import nn

        from lbsgd.algorithm.seeded import seeded

        class Residual(nn.Module):
            """x + f(x), where f begins as 0, because the last batch norm's gamma is 0 (Sec. 5.1)."""

            def __init__(self, channels):
                super().__init__()
                self.body = nn.Sequential(
                    nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                    nn.BatchNorm2d(channels),
                    nn.GELU(),
                    nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                    nn.BatchNorm2d(channels),
                )
                nn.init.zeros_(self.body[-1].weight)

            def forward(self, images):
                return images + self.body(images)

        with seeded(plan.recipe.seed):
            return nn.Sequential(
                nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(16),
                nn.GELU(),
                Residual(16),
                Residual(16),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(16, num_classes),
            )


if __name__ == "__main__":
    main(Small(), __doc__)
