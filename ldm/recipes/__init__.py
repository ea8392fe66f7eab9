"""The published models' training, as recipes."""
