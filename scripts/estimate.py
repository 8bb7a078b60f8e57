"""Memory and time of a run before it is started: python scripts/estimate.py data=listops trainer=ddp"""

import sys

from approx_attn.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("estimate"))
