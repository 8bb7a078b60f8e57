"""eigen_cluster on a GPU: is it right, how fast, how much memory: scripts/gpu.py [folder]"""

import sys

from approx_attn.diagnosis.benchmark.gpu import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
