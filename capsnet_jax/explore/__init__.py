"""The explorer: a page in the browser that shows a trained model at work on drawings and images."""
