"""Write RESULTS.md anew from records of comparisons: python scripts/results.py publish=[listops,mqar]"""

import sys

from approx_attn.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("results"))
