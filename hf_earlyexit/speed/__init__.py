"""Measurement and prediction of decoding time, and placement of exits."""
