"""Nothing in these tests may wait for a network: what the hub does not have on this disk fails at once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
