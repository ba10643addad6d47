"""Ids <-> meaning: commits, refs, revisions, what is reachable.  No tensors, no torch."""
