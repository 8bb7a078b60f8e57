"""A package of one's own: a mechanism, a model and data, with their configurations.

approx-attn train plugins=[my_package] data=last_marker attention=alibi
"""

from my_package import attention, data, model

__all__ = ["attention", "data", "model"]
