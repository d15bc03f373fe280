"""Other ways to compute what the layers compute, for speed and memory; each is proved equal to the plain way."""
