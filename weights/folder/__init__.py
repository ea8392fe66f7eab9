"""The JSON of a diffusers folder."""
