"""What looks at the scripts: python -m tools.compare, tools.plot, tools.bench, tools.memory."""
