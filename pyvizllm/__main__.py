"""`python -m pyvizllm` is the `pyvizllm` command."""

import sys

from pyvizllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
