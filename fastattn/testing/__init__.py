"""Shared by tests and benchmarks: inputs, the error rule, timing."""
