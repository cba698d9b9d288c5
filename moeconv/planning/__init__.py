"""The plan of a conversion: every byte of the output, before the first is written."""
