"""ResNet-101 of Goyal et al. 2017 (Table 2c): recipes/resnet50.py with a deeper network.

    deepspeed --hostfile hosts recipes/resnet101.py --deepspeed_config ds_configs/8k.json

The JSONs are the same, because nothing in them depends on the depth. The paper reached 22.08 ± 0.06 % top-1 error
with a global batch of 256 (ds_configs/256.json), and 22.36 ± 0.09 % with 8,192 in 92.5 minutes on 256 P100; this
repository has not yet trained on ImageNet itself.
"""

from resnet50 import ResNet50

from lbsgd.commands.train import main


class ResNet101(ResNet50):
    name = "resnet101"


if __name__ == "__main__":
    main(ResNet101(), __doc__)
