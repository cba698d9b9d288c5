"""moeconv: Mixture-of-Experts checkpoints from MaxText to Hugging Face, with evidence.

Importing this package imports nothing heavy; every command pulls in only what it needs.
"""

__version__ = "0.2.0.dev0"
