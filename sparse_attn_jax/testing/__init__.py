"""What tests, benchmarks and users check an implementation with: the definition, the cases, their inputs, the comparison."""
