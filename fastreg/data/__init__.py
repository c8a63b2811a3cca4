"""Pairs of scans in files, what a net is given of them, and pairs whose motion is known."""
