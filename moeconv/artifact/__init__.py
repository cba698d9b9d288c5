"""A converted model as a folder: its manifest, which files are whose, what may be replaced."""
