"""The network: layers, the model made of them, and its losses."""
