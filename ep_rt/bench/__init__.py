"""``python -m ep_rt bench``: times of the normal mode, each checked before it is taken.

Three times, always together (design section 6): *kernel*, *op* and *call*; see `measure`.
"""
