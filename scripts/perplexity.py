"""Perplexity by mechanism and budget: python scripts/perplexity.py model=<causal model> data=<text file>"""

import sys

from approx_attn.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("perplexity"))
