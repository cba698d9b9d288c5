"""The two models that are compared: MaxText, and stock transformers."""
