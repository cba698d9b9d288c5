"""Evidence that a converted model computes what MaxText computes."""
