"""The same result where numbers or memory end: recovery, precision, tiles, offloading."""
