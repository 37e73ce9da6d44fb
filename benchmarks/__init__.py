"""The performance suite and its peers, and measurements committed with the machine that made them.

In the source tree `python -m benchmarks`; installed, this is `robustft.benchmarks` and runs as `robustft bench`.
"""
