"""What looks at the scripts, and make_pairs.py, which makes data. CONTRIBUTING.md lists them."""
