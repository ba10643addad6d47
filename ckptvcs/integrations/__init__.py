"""Integrations with training libraries.

Each module needs the extra of its name, and no other module imports it.
"""
