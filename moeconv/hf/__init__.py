"""The files of a Hugging Face model: safetensors, configs, tokenizer."""
