"""Parameters sharded over a mesh (DTensor): which elements a rank holds, and what the ranks tell each other.

A rank's shard is stepped like any tensor, with two differences: its rounding words are those of its elements' places
in the whole tensor (:class:`lamb16.sharding.layout.Layout`), and before the update the ranks that share a tensor reduce
its three maxima, and after it its sums (:class:`lamb16.sharding.reduction.Reduction`), so that norms and scales are the
whole tensor's.

``layout.py`` and ``exchange.py`` know nothing of the step and are what it stands on; ``reduction.py`` stands on it.
"""
