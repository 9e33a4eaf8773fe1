"""Sources: a task, a card, a checkpoint, a MONAI bundle or an nnU-Net folder, and the networks that they are."""
