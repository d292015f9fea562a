"""Synthetic chest X-rays, where the truth is known: is the explanation right?"""
