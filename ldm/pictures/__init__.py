"""Picture files: read, write, masks, sheets."""
