"""python tools/plan.py FILE --gpus 256 [--png schedule.png]

What a JSON means on so many GPUs: batch, schedule, memory, bytes, predicted time. Needs no data, no GPU, no torch. The same as `lbsgd plan`.
"""

import sys

from lbsgd.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
