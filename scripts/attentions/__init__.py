"""`python -m scripts.attentions`: what the attentions of a trained model do, as statistics, heat maps and a page."""
