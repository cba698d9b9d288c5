"""What a model is: its description, where each field came from, and how a checkpoint is laid out."""
