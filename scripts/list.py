"""The mechanisms, what they can do and what they cost: python scripts/list.py eigen_topk"""

import sys

from approx_attn.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("list"))
