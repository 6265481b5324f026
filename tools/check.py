"""python tools/check.py FILE [FILE ...] [--json] [--fix]

Say what is wrong in DeepSpeed JSONs, with or without an lbsgd block, why it hurts, and how to fix it. Exit code 1 on
errors. The same as `lbsgd check`.
"""

import sys

from lbsgd.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["check", *sys.argv[1:]]))
