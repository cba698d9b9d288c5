"""How a model family maps between MaxText and Hugging Face: axes, ops, rules and the families."""
