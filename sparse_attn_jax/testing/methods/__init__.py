"""Definitions of the methods in float64 NumPy, from their formulas; they share no code with the library."""
