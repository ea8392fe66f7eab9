"""The networks, with the published checkpoints' own parameter names."""
