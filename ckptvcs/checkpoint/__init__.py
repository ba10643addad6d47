"""What a checkpoint is: files read structurally, never executed; tensors found and named."""
