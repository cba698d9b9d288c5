"""Untrusted input: files, JSON and text that may be damaged, huge or hostile."""
