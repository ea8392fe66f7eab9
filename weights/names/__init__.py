"""Whose name is whose, and which family it is."""
