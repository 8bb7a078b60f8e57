"""Budgets by layer and head from a target: python scripts/allocate.py model=<...> data=<text file> mean_share=0.125"""

import sys

from approx_attn.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("allocate"))
