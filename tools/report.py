"""python tools/report.py RUN [RUN ...] [--output curves.png]

Lays runs over each other: a table on the screen and their curves in a picture. RUN is a run's folder or its log.jsonl.
"""

import sys

from lbsgd.report.curves import main

if __name__ == "__main__":
    sys.exit(main())
