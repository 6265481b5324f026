"""python -m lbsgd COMMAND: the command `lbsgd`"""

import sys

from lbsgd.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
