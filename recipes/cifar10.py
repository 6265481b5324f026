r"""A residual network of 8 layers for CIFAR-10, small enough for two CPU cores, with the paper's recipe.

    lbsgd convert --source cifar-10-python.tar.gz --data_dir data/cifar10_ffcv --raw_fraction 1 --max_side 32
    python recipes/cifar10.py --deepspeed_config ds_configs/cifar10/1k.json --data_dir data/cifar10_ffcv \
        --output_dir runs/cifar10_1k

`lbsgd reproduce table1 cifar10` runs it for every row of the paper's Table 1.
"""

from resnet50 import ResNet50

from lbsgd.commands.train import main


class SmallResNet(ResNet50):
    """A 3x3 stem and basic blocks, one per resolution; everything else is as in recipes/resnet50.py.

    The stem halves the resolution, because a core then trains 1.8 times as many images as with the same channels at
    full resolution.
    """

    name = "resnet8"
    widths = (24, 48, 96)  # channels at 16x16, 8x8 and 4x4
    blocks = 1  # at each resolution
    stem_stride = 2

    def network(self, num_classes, plan):
        from lbsgd.algorithm.seeded import seeded

        with seeded(plan.recipe.seed):
            zero_last_gamma = plan.recipe.batch_norm.zero_last_gamma
            return small_resnet(self.widths, self.blocks, self.stem_stride, num_classes, zero_last_gamma)


def small_resnet(widths, blocks, stem_stride, num_classes, zero_last_gamma):
    """Return the network with the initialisation of Sec. 5.1."""
    from torch import nn
    from torchvision.models.resnet import BasicBlock

    first = widths[0]
    stem = nn.Conv2d(3, first, 3, stem_stride, padding=1, bias=False)
    layers = [stem, nn.BatchNorm2d(first), nn.ReLU(inplace=True)]
    for before, width in zip((first, *widths), widths, strict=False):  # ends with the shorter `widths`
        stride = 1 if before == width else 2
        shortcut = [nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)] if stride == 2 else None
        layers.append(BasicBlock(before, width, stride, nn.Sequential(*shortcut) if shortcut else None))
        layers += [BasicBlock(width, width) for _ in range(blocks - 1)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), head := nn.Linear(widths[-1], num_classes)]
    network = nn.Sequential(*layers)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, BasicBlock) and zero_last_gamma:
            nn.init.zeros_(module.bn2.weight)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return network


if __name__ == "__main__":
    main(SmallResNet(), __doc__)
