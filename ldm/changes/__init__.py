"""Models changed, or cut from models: LoRAs, learnt words, surgery."""
