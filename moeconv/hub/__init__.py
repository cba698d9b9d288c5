"""Publishing a converted, verified model on the Hugging Face Hub."""
