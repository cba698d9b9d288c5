"""Verifying a MaxText run that convert made of a Hugging Face model: the roles are exchanged."""
