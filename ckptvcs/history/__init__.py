"""Commits, refs, revisions and reachability.  No tensors, no torch."""
