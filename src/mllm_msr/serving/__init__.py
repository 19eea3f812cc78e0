"""The HTTP application: its state, one queue in front of the model, and what it answers."""
