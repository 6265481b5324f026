"""python -m lbsgd plan / check / config / report"""

import sys

from lbsgd.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
