"""Transform images as Pillow does, with gradients, and find matches that survive it."""
