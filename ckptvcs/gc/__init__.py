"""Garbage collection: retention rules, fading, and deletion."""
