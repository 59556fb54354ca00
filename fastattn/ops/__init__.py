"""What: one file per op, with its contract, checks, plain-PyTorch reference, schema and gradient."""
