"""A task that counts nothing in training and is judged by its own numbers, of which more is better.

python tests/uncounted_recipe.py --deepspeed_config tests/cluster/small.json --fake_data
"""

from cluster.small import Small

from lbsgd.commands.train import main
from lbsgd.report.measure import Measure


class Uncounted(Small):
    name, counts = "uncounted", ()
    judged_by = (
        Measure("val_score", "score", "score", of_run="last", higher=True),
        Measure("val_other", "other score", "other", "points", of_run="last", higher=True),
        Measure("val_third", "third score", "third", headline=False),
    )

    def loss(self, network, batch):
        return super().loss(network, batch)[0], []

    def evaluate(self, network, batches):
        correct = 100 - super().evaluate(network, batches)["val_top1_error_pct"]
        return {"val_score": correct, "val_other": correct / 2, "val_third": 1.0}


if __name__ == "__main__":
    main(Uncounted(), __doc__)
