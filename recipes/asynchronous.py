r"""Asynchronous against synchronous updates, simulated on one process (the paper's Sec. 6 on related work).

    python recipes/asynchronous.py --updates async --deepspeed_config ds_configs/digits/256.json --data_dir ... \
        --output_dir runs/async

k workers take n images at a time. Asynchronous: as soon as a worker is ready, the server moves the weights by its
gradient, computed at weights τ updates old, and gives it the new weights. Synchronous: one update per k gradients, when
the slowest worker is ready. In both, each gradient moves the weights by η/k, and the images are the same. The time of
each gradient is drawn from a log-normal distribution with mean 1 and the given spread (`lbsgd/train/simulated.py`).
"""

from argparse import ArgumentTypeError
from contextlib import ExitStack

from digits import DigitsResNet

from lbsgd.commands.flag_types import at_least_zero
from lbsgd.commands.recipe_flags import parser
from lbsgd.commands.simulate import opened, run_simulation

MOST_SPREAD = 2.0  # with it 10,000 drawn times are 1 ± 0.07 on average; with a larger one almost all are near 0


def main():
    flags = parser(__doc__)
    flags.add_argument(
        "--updates", choices=("sync", "async"), required=True, help="how the workers' gradients are used"
    )
    flags.add_argument(
        "--spread",
        type=spread_of_times,
        default=0.3,
        metavar="S",
        help="of the workers' times, at most 2 (default: 0.3)",
    )
    run_simulation(flags, simulate)


def spread_of_times(text):
    """A number from 0 to MOST_SPREAD."""
    number = at_least_zero(text)
    if number > MOST_SPREAD:
        raise ArgumentTypeError(f"{text!r} is too large: give a number up to {MOST_SPREAD:g}")
    return number


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
