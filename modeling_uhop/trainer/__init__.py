"""The separation step inside the stock `Trainer` of transformers."""
