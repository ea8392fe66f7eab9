"""What tests make and share: seeded networks, checkpoints, corpora."""
