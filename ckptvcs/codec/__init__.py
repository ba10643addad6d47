"""Arrays <-> bytes.  No path, no clock, no id, no chance: same input, same bytes."""
