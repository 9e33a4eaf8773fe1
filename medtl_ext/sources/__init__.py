"""Other people's networks as sources: what a card or a bundle of theirs may name, and how it is read."""
