"""The two models that are compared: MaxText on one side, stock transformers on the other."""
