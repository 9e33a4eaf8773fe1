"""Sources of a transfer: a task, a card, a checkpoint, a MONAI bundle or an nnU-Net folder, and their networks."""
