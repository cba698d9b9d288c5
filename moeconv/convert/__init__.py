"""Converting: a plan made before the first byte is written, and an engine that carries it out."""
