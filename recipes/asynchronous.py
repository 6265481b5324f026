r"""Asynchronous against synchronous updates, simulated on one process (the paper's Sec. 6 on related work).

    python recipes/asynchronous.py --updates async --deepspeed_config ds_configs/digits/256.json --data_dir ... \
        --output_dir runs/async

k workers take n images at a time. Asynchronous: as soon as a worker is ready, the server moves the weights by its
gradient, computed at weights τ updates old, and gives it the new weights. Synchronous: one update per k gradients, when
the slowest worker is ready. In both, each gradient moves the weights by η/k, and the images are the same. The time of
each gradient is drawn from a log-normal distribution with mean 1 and the given spread (`lbsgd/train/simulated.py`).
"""

from contextlib import ExitStack

from digits import DigitsResNet

from lbsgd.commands.flag_types import at_least_zero
from lbsgd.commands.recipe_flags import parser
from lbsgd.commands.simulate import opened, run_simulation


def main():
    flags = parser(__doc__)
    flags.add_argument(
        "--updates", choices=("sync", "async"), required=True, help="how the workers' gradients are used"
    )
    flags.add_argument(
        "--spread", type=at_least_zero, default=0.3, metavar="S", help="of the workers' times (default: 0.3)"
    )
    run_simulation(flags, simulate)


def simulate(request):
    """Train one network and log each epoch's errors, simulated time and mean staleness."""
    task, updates, spread = DigitsResNet(), request.flags.updates, request.flags.spread
    described = {"model": f"{task.name}, {updates}", "simulated": {"updates": updates, "spread": spread}}
    with ExitStack() as stack:
        simulation = opened(request, task, described, stack, asynchronous=updates == "async", spread=spread)
        server = simulation.server
        for epoch in range(simulation.num_epochs):
            training = server.train(simulation.train.epoch(epoch))
            simulation.epoch({"epoch": epoch + 1, **training, **server.evaluate(simulation.val)})
        simulation.result()


if __name__ == "__main__":
    main()
