"""Put the tables of finished comparisons into RESULTS.md: python scripts/results.py results/listops results/mqar"""

import sys

from approx_attn.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("results"))
