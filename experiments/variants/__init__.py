"""Tables of variants for sweep.py: VARIANTS maps a name to the config fields that differ.

The first variant of a table is its base: the others are compared with it.
"""
