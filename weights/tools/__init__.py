"""A verb each: inspect, diff, convert, merge, repair."""
