"""Decode tensors from packs, and restore files and states."""
