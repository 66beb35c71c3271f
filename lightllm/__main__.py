"""`python -m lightllm`, the same as the command `lightllm`."""

import sys

from lightllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
