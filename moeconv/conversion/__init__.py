"""Converting: a plan is prepared, carried out, and published whole or not at all."""
