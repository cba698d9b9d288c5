"""What is measured on two models, and the limits that it is held to."""
