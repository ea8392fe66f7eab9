"""What is seen of a run: log, validation, chart, report, card."""
