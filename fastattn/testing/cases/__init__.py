"""The cases that are timed: one file per op, each a list of shapes and how to run them on every peer."""
