"""How good classifier, GAN and explanation are, and how fast the code is."""
