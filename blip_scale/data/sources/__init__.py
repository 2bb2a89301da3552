"""Readers of data sets, one module each. `readers` lists them."""
