"""`python -m jfog`: the command `jfog`."""

import sys

from jfog import cli

if __name__ == "__main__":
  sys.exit(cli.main())
