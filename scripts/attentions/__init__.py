"""What the attentions of a trained model do: statistics and heat maps; `python -m scripts.attentions`."""
