"""The model card of a compressed model: what it is made of, how, and what that cost."""
