"""How fast regd is, beside what else does the same work: `make bench`."""
