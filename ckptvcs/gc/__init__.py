"""What may go: rules, fading, and the collector that deletes."""
