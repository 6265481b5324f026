"""ResNet-50 of Goyal et al. 2017 (Sec. 5.1).

    deepspeed --hostfile hosts recipes/resnet50.py --deepspeed_config ds_configs/8k.json

on ImageNet in FFCV files (python tools/convert_imagenet_to_ffcv.py). The paper reached 23.74 ± 0.09 % top-1 error with a
global batch of 8,192 on 256 GPUs, and 23.60 ± 0.12 % with 256 (ds_configs/256.json); this repository has not yet trained
on ImageNet itself. `make demo` runs this file on scikit-learn's digits. One GPU, without the launcher:

    python recipes/resnet50.py --deepspeed_config ds_configs/256.json --micro_batch 256
"""

from lbsgd.train.run import main


def network(num_classes, plan):
    from lbsgd.algorithm.resnet import resnet  # imported here, for a mistake in a flag should not wait for PyTorch

    return resnet("resnet50", num_classes, plan.recipe.batch_norm.zero_last_gamma, plan.recipe.seed)


if __name__ == "__main__":
    main("resnet50", network, __doc__)
