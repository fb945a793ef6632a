"""Model families, one file each, named as Hugging Face's ``model_type``; the torch reference."""
