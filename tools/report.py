"""python tools/report.py RUN [RUN ...] [--output curves.png]

Lay runs over each other: a table on the screen and their curves in a picture. RUN is a run's folder or its log.jsonl.
The same as `lbsgd report`.
"""

import sys

from lbsgd.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
