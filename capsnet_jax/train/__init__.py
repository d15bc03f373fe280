"""Training: a step, the loop around it, and evaluation."""
