"""Tensors to packs: which encoder codes what, with which settings, and how well."""
