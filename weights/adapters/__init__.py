"""LoRAs and learnt words: files of changes to a model."""
