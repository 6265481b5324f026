"""python tools/report.py RUN [RUN ...] [--output_dir DIR]

Compare runs: tables on the screen, and files in --output_dir. RUN is a run's folder or its log.jsonl. The same as
`lbsgd report`.
"""

import sys

from lbsgd.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
