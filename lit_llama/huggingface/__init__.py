"""The file format of Hugging Face: configurations, weights and tokenizers, in both directions."""
