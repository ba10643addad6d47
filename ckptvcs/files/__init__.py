"""The user's files: allowed names, target folders, writing and deleting."""
