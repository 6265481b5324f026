"""python tools/plan.py FILE --gpus 256 [--png schedule.png]

Show what a JSON means on N GPUs: batch, schedule, memory, bytes, predicted time. It needs no data, no GPU and no torch.
The same as `lbsgd plan`.
"""

import sys

from lbsgd.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
