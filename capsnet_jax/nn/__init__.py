"""The network: layers, model and losses."""
