"""Measure how good classifier, GAN and explanations are, and how fast the code is."""
