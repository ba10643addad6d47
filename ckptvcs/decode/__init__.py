"""Packs to tensors and files: chains are decoded from a keyframe on."""
