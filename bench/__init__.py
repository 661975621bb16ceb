"""The bench: how fast every op is on the GPU at hand, held to that GPU's own limits and to peers.

``bench_<op>.py`` names an op's shapes and its peers; ``nemokernels bench`` runs them. No time is
reported of a result that has not been checked against the float64 reference in the same run.
"""
