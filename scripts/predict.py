"""Classes of new texts or images: python scripts/predict.py checkpoint=runs/.../checkpoints/best.ckpt data=<file>"""

import sys

from approx_attn.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("predict"))
