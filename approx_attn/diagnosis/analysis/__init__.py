"""Analysis: is attention low-dimensional, do layers share an eigenspace, and what do norms show that weights hide?

`collect` fills streaming accumulators from a live model in one pass; `spectrum`, `overlap` and `norms` hold plain
functions on arrays; the sections write the report.
"""
