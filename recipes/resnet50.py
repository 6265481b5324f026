"""ResNet-50 of Goyal et al. 2017 (Sec. 5.1), on ImageNet in FFCV files (python tools/convert_imagenet_to_ffcv.py).

    deepspeed --hostfile hosts recipes/resnet50.py --deepspeed_config ds_configs/8k.json
    python recipes/resnet50.py --deepspeed_config ds_configs/256.json --micro_batch 256         # one GPU, no launcher

The paper reached 23.74 ± 0.09 % top-1 error with a global batch of 8,192 on 256 GPUs, and 23.60 ± 0.12 % with 256; this
repository has not yet trained on ImageNet itself. `make demo` runs this file on scikit-learn's digits.
"""

from lbsgd.commands.train import main
from lbsgd.report.measure import CLASSIFIER


class ResNet50:
    """Images and labels: cross-entropy in training, top-1 and top-5 error in evaluation."""

    name = "resnet50"  # in the log
    architecture = None  # torchvision's name, if it is not `name`
    counts = ("top1_error",)  # what `loss` counts among the images of a pass
    judged_by = CLASSIFIER

    def network(self, num_classes, plan):
        from lbsgd.algorithm.resnet import resnet  # imported late, because a wrong flag is told before PyTorch loads

        network, zero_last_gamma = self.architecture or self.name, plan.recipe.batch_norm.zero_last_gamma
        return resnet(network, num_classes, zero_last_gamma, plan.recipe.seed)

    def loss(self, network, batch):
        from torch.nn.functional import cross_entropy

        images, labels = batch
        logits = network(images)
        return cross_entropy(logits.float(), labels), [(logits.argmax(1) != labels).sum()]

    def evaluate(self, network, batches):
        import torch

        from lbsgd.train.evaluation import over_all_processes

        sums = torch.zeros(4, dtype=torch.float64, device=network.device)
        for images, labels in batches:
            logits = network(images).float()
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            hits &= ~logits.isnan().any(1, keepdim=True)  # topk takes NaN as the largest, which would be class 0
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([losses, hits[:, 0].sum(), hits.sum(), losses.new_full((), len(labels))])
        loss, top1, top5, num_images = over_all_processes(sums)
        return {
            "val_loss": loss / num_images,
            "val_top1_error_pct": 100 * (1 - top1 / num_images),
            "val_top5_error_pct": 100 * (1 - top5 / num_images),
            "val_correct_top1": int(top1),
            "val_correct_top5": int(top5),
            "val_images": int(num_images),
        }


if __name__ == "__main__":
    main(ResNet50(), __doc__)
