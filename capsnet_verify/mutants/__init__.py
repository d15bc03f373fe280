"""Wrong models, routings and optimizers, each with the check that must catch it; many have been seen in public code."""
