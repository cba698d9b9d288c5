"""Carrying out a plan: every chunk decoded once, within memory, and resumable."""
