"""What a dataset looks like, on one page that needs no network: read, draw, render."""
