"""List, filter and prune runs: python scripts/runs.py attention=eigen_topk status=failed"""

import sys

from approx_attn.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("runs"))
