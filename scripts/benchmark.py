"""Time, memory and error of mechanisms side by side: scripts/benchmark.py attention=[eigen_cluster,mra]"""

import sys

from approx_attn.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("benchmark"))
