"""Other people's networks, read into source cards."""
