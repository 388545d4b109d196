"""Mutation tests of the CUDA kernels: breaks them one change at a time and sees which tests notice, on the simulator.

`python -m tools.mutants --help` says how to run it.
"""
