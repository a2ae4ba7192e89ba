"""What ``benchmarks/methods.py`` is made of: the networks and the rows."""
