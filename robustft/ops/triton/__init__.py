"""Triton bodies of operators that csrc/ops.cpp declares, a family a file, under the operators' names."""
