"""Measurements that are committed with the command and the machine that made them. Run from the source tree."""
