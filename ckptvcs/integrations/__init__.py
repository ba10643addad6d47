"""Trainers of others: each module needs the extra of its name, and is loaded by nothing else."""
