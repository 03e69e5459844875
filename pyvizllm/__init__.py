"""See inside every training step, for free."""
