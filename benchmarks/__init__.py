"""Measures the library side by side with its peers: `python -m benchmarks.run --help`."""
