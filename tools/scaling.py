"""The tables of docs/scaling.md, predicted by the code of `lbsgd plan`.

    python tools/scaling.py            prints them
    python tools/scaling.py --write    puts them into docs/scaling.md

tests/test_predict.py compares the page with them.
"""

from __future__ import annotations

from pathlib import Path

from lbsgd.commands.flag_types import OneLineParser
from lbsgd.config.memory import network
from lbsgd.config.prediction import BACKWARD_SHARE, Prediction, Reduction, predict
from lbsgd.config.traffic import FLAT_RING, HALVING, PRESETS, RING, share_over_a_link
from lbsgd.units import markdown_table

PAGE = Path(__file__).parent.parent / "docs/scaling.md"
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
IMAGES = 32  # per GPU and iteration: one worker of the paper
BUCKET = 6_000_000  # elements, as in ds_configs
BYTES_PER_WEIGHT = {"p100-2017": 4, "dgx-a100": 2, "dgx-h100": 2}  # the paper computed in float32
BEGIN, END = "<!-- tools/scaling.py -->", "<!-- end -->"


def reduction(name: str) -> Reduction:
    parameters = network("resnet50").num_parameters
    return Reduction(BYTES_PER_WEIGHT[name] * parameters, -(-parameters // BUCKET))


def limit(name: str, gpus: int, it: Prediction) -> str:
    """Return what an iteration waits for if everything that can be hidden is hidden."""
    if it.gradient_seconds == 0:
        return "nothing: one server"
    where, traffic = PRESETS[name], reduction(name)
    moved = (
        share_over_a_link(it.algorithm, where.servers(gpus), gpus)
        * traffic.gradient_bytes
        * 8
        / (where.link_gbit * 1e9)
    )
    if it.gradient_seconds <= it.compute_seconds * BACKWARD_SHARE:
        return "the last bucket"
    return "the link" if moved > it.gradient_seconds / 2 else "latency"


def row(name: str, gpus: int) -> list[str]:
    found = [predict(IMAGES, 1, gpus, reduction(name), PRESETS[name], each) for each in (FLAT_RING, RING, HALVING)]
    cells = [f"{it.efficiency(False):.0%} to {it.efficiency(True):.0%}" for it in found]
    return [f"{gpus:,}", *cells, limit(name, gpus, found[0]), limit(name, gpus, found[-1])]


def tables() -> str:
    lines = []
    for name, preset in PRESETS.items():
        heads = (
            "GPUs",
            "flat ring",
            "phases, ring",
            "phases, halving/doubling",
            "limit, flat ring",
            "limit, halving/doubling",
        )
        lines += [f"### {name}", "", f"{preset.source[0].upper()}{preset.source[1:]}.", ""]
        lines += [markdown_table(heads, [row(name, gpus) for gpus in GPUS]), ""]
    return "\n".join(lines)


def page(text: str) -> str:
    """Return the page with the current tables."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n\n" + tables() + "\n" + END + rest.partition(END)[2]


def main() -> None:
    flags = OneLineParser(description=__doc__)
    flags.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    if flags.parse_args().write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(tables())


if __name__ == "__main__":
    main()
