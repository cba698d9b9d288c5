"""The four levels of evidence, one module each, and what they share."""
