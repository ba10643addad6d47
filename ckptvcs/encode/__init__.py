"""Tensors to packs: which coder codes what, with which settings, and how well."""
