"""The recipe of tests/cluster/small.py with dropout, whose masks differ if random states are lost on a resume.

deepspeed --num_accelerators 2 tests/crash_recipe.py --deepspeed_config JSON --fake_data
"""

from cluster.small import Small

from lbsgd.commands.train import main


class Crash(Small):
    name = "crash"

    def network(self, num_classes, plan):
        from torch import nn

        layers = super().network(num_classes, plan)
        layers.insert(len(layers) - 1, nn.Dropout(0.5))
        return layers


if __name__ == "__main__":
    main(Crash(), __doc__)
