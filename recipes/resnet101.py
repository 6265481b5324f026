"""ResNet-101 of Goyal et al. 2017 (Table 2c).

    deepspeed --hostfile hosts recipes/resnet101.py --deepspeed_config ds_configs/8k.json

as recipes/resnet50.py, with the same JSONs: nothing in them depends on the depth. The paper reached 22.08 ± 0.06 % top-1 error
with a global batch of 256 (ds_configs/256.json) and 22.36 ± 0.09 % with 8,192, in 92.5 minutes on 256 P100; this repository
has not yet trained on ImageNet itself.
"""

from lbsgd.train.run import main


def network(num_classes, plan):
    from lbsgd.algorithm.resnet import resnet  # imported here, for a mistake in a flag should not wait for PyTorch

    return resnet("resnet101", num_classes, plan.recipe.batch_norm.zero_last_gamma, plan.recipe.seed)


if __name__ == "__main__":
    main("resnet101", network, __doc__)
