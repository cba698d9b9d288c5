"""A MaxText run as people have it: the checkpoint, its config, its sidecar and its records."""
