"""What users do with a repository."""
