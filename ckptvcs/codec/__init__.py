"""Convert between arrays and bytes. The same input always gives the same bytes."""
