"""Nothing in these tests waits for a network, and workers that run beside each other take one thread each."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # what the hub does not have on this disk fails at once
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
