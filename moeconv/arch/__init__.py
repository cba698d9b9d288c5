"""What a model is: its description, where fields came from, how a checkpoint is laid out."""
