"""`lbsgd plan`: show what a JSON means on N GPUs. It needs no data, no GPU and no torch."""

from __future__ import annotations

import argparse
import json

from lbsgd.commands.flag_types import named, positive, quantity
from lbsgd.commands.reader import reader_may_leave
from lbsgd.commands.recipe_flags import add_overrides


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("file", type=named, metavar="FILE", help="a DeepSpeed JSON with an lbsgd block, such as ds_configs/8k.json")
    add("--gpus", type=positive, metavar="N", help="number of GPUs (default: as many as take kn in one pass)")
    add("--num_images", "--images", type=positive, metavar="N", help="training images (default: the JSON's)")
    add("--model", default="resnet50", help="network to estimate memory, bytes and time of (default: %(default)s)")
    add("--png", type=named, metavar="FILE", help="draw the schedule, as .png, .svg or .pdf")
    add("--json", action="store_true", help="print everything as JSON, for machines")
    add_overrides(command)
    add_machines(command.add_argument_group("for the prediction; the defaults are the paper's machines"))


def add_machines(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    speed = "images per second of one GPU inside its server (default, of ResNet-50 at 224: a P100's 138, 29 h on 8)"
    kinds = "kind of machine, which sets the next three; the output names the source of each (default: %(default)s)"
    add("--machine", choices=("p100-2017", "dgx-a100", "dgx-h100"), default="p100-2017", help=kinds)
    add("--images_per_second", type=quantity, metavar="X", help=speed)
    add("--gpus_per_server", type=positive, metavar="N", help="GPUs that share a server's links (default: 8)")
    add("--link_gbit", type=quantity, metavar="X", help="Gbit/s of a server's links together (default: a P100's 50)")
    latency = "microseconds per message between servers, an assumption (default: %(default)g)"
    add("--latency_us", type=quantity, default=20.0, metavar="X", help=latency)


@reader_may_leave()
def run(given: argparse.Namespace) -> int:
    """Print the plan, or its JSON, and draw the picture if --png asks for one."""
    # Late: the other commands start without the plan and its schema.
    from lbsgd.commands.plan_figure import draw
    from lbsgd.commands.plan_outlook import Outlook
    from lbsgd.commands.plan_screen import Screen

    outlook = Outlook.of(given)
    if given.png:
        draw(outlook.plan, given.png)
    if given.json:
        print(json.dumps(outlook.as_dict(), indent=2))
        return 0
    Screen(outlook).show()
    if given.png:
        print(f"\npicture: {given.png}")
    return 0
