"""What can be known of a run before a minute of GPU quota is spent; see check.py."""
