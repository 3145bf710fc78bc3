"""What the scripts stand on: flags, models, sampling, data, rewards, runs. No algorithm is here."""
