"""Time and memory of the model beside its PyTorch twin, each in a process of its own, in turn."""
