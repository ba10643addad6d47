"""Tools around the package: demo, benchmark, checks."""
